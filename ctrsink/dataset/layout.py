"""How sequences are built: it belongs to the trained model as much as its weights do."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from ctrsink.dataset.manifest import Manifest
from ctrsink.errors import InputError
from ctrsink.features.columns import columns_of
from ctrsink.features.registry import Need, signal


@dataclass(frozen=True)
class Layout:
    """What a sequence holds."""

    family: str
    """Of the model, whose `encode` builds it."""
    examples: Literal["per_target", "per_request", "per_user"]
    history: int
    targets: int
    signals: tuple[str, ...] = ()
    """Of behaviours: buckets and categories."""
    buckets: int = 1
    """Values of each of these that is a bucket."""
    rows: int = 1
    """Rows of the table of each of these that is hashed."""
    retrieve: int | None = None
    """`per_target`: of the history only this many behaviours, those most similar to the target."""
    retrieve_by: Literal["vectors", "neighbours"] = "vectors"
    numbers: tuple[str, ...] = ()
    """Of behaviours."""
    target_signals: tuple[str, ...] = ()
    """Categories told to targets."""
    target_rows: int = 1
    """Rows of the table of each of these that is hashed."""
    target_numbers: tuple[str, ...] = ()
    base: str | None = None
    """The number whose value is the logit of the base score."""
    similarity: Literal["neighbours", "vectors"] | None = None
    """Where the similarity of targets and sinks comes from; None: it is not told."""
    text_history: int | None = None
    """Of the behaviours before the first target only so many latest have a text, the others are their sink alone; None: all."""
    window: int | None = None
    """How many events before its own a position of text attends to; None: all. With `chunks`: sinks that it reads one by one."""
    asked_history: int = 0
    """`per_user`: of the behaviours before the first target so many latest are asked as targets are. In training none is: a
    sequence's targets do that. A request has one target, and its history must look as it did in training."""
    by_text: bool = False
    """Similarity by neighbours is that of texts for items without a partner."""
    chunks: int = 0
    """Parts that a history is divided into for a model that reads summaries of them; 0: it is not."""
    chunking: Literal["time", "equal"] = "time"
    """Where these parts begin: behind the longest gaps, or after as many behaviours each."""
    transition: int = 0
    """Sinks at the end of each part that a position of text reads one by one."""
    utc_offset_hours: float = 0.0
    """What `hour` and `weekday` are counted at."""
    scales: tuple[tuple[str, float, float], ...] = ()
    """Name, mean and deviation of each number, as of the training range."""

    def on(self, manifest: Manifest, uri: str) -> "Layout":
        """This layout on the data set `uri`.

        Raises:
            InputError: it lacks something that sequences depend on.
        """
        self.require(manifest, uri)
        return replace(self, by_text="neighbours" in self.needs and manifest.text_line is not None)

    def serving(self) -> "Layout":
        """As requests are answered: the last of a `per_user` sequence's targets, and so any target, sees all before it.

        That is everything up to `history` before the first target, and the texts in between.
        """
        more = self.targets - 1 if self.examples == "per_user" else 0
        spoken = None if self.text_history is None else self.text_history + more
        return replace(self, history=self.history + more, text_history=spoken, asked_history=more)

    def require(self, manifest: Manifest, uri: str) -> None:
        """Raise InputError where the data set `uri` was prepared without something that the sequences depend on."""
        if self.needs_vectors and manifest.encoder is None:
            raise InputError(
                f"the data set {uri} has no item vectors, which the signal similarity, data.retrieve and model.similarity: "
                "vectors need: prepare it again with prepare.encoder"
            )
        if "neighbours" in self.needs and manifest.neighbours is None:
            raise InputError(
                f"the data set {uri} has no table of neighbours, which the signal affinity, data.retrieve_by and "
                "model.similarity: neighbours need: prepare it again with prepare.neighbours"
            )

    @classmethod
    def load(cls, plain: dict[str, Any]) -> "Layout":
        """The layout whose fields `dataclasses.asdict` gave; JSON has lists for tuples."""
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
        values["scales"] = tuple((name, mean, deviation) for name, mean, deviation in plain["scales"])
        return cls(**values)

    @property
    def sinks(self) -> bool:
        """Whether behaviours end in a sink."""
        return bool(self.signals or self.numbers)

    @property
    def names(self) -> tuple[str, ...]:
        """All signals that are told, and the base score."""
        told = (*self.signals, *self.numbers, *self.target_signals, *self.target_numbers)
        return told if self.base is None else (*told, self.base)

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of them that are columns."""
        return tuple(dict.fromkeys(column.signal for column in columns_of(self.names)))

    @property
    def needs(self) -> frozenset[Need]:
        """What of a data set sequences depend on."""
        names = self.names
        found: set[Need] = {need for name in names for need in signal(name).needs}
        if self.by_text:
            found.add("vectors")
        if self.retrieve is not None:
            found.add(self.retrieve_by)
        if self.similarity is not None:
            found.add(self.similarity)
        return frozenset(found)

    @property
    def needs_vectors(self) -> bool:
        """Whether sequences depend on the vectors of the items."""
        return "vectors" in self.needs

    @property
    def depends_on_target(self) -> bool:
        """Whether a history depends on the item of its target, so that targets cannot share it."""
        return "similarity" in self.signals or self.retrieve is not None

    @property
    def compares_neighbours(self) -> bool:
        """Whether sequences depend on the similarity of two events by neighbours."""
        return self.similarity == "neighbours" or (self.retrieve is not None and self.retrieve_by == "neighbours")

    @property
    def events_of_signals(self) -> bool:
        """Whether more than times is told of events."""
        hashed = any(signal(name).hashed for name in (*self.signals, *self.target_signals))
        return bool(self.numbers or self.target_numbers or hashed or self.base or self.compares_neighbours)


def require_signals(uri: str, manifest: Manifest, names: tuple[str, ...], section: str, buckets: int) -> None:
    """Refuse signals that the data set `uri` cannot tell.

    Args:
        section: key of the section with their `buckets`, the rows of the table of feedback.

    Raises:
        InputError: it was prepared without one of them, or has more different texts of feedback.
    """
    if "feedback" in names and (texts := len(manifest.feedback_texts)) > buckets:
        raise InputError(
            f"{section}: the signal feedback has {texts} different texts in the data set {uri}, more than {section}.buckets "
            f"{buckets}: raise buckets, or prepare with a coarser text.feedback such as ' {{feedback:.1f}}'"
        )
    for name in names:
        found = signal(name)
        lacks = name not in (manifest.columns if "columns" in found.needs else manifest.numbers)
        if lacks and (found.kind == "number" or "columns" in found.needs):
            keys = {"fields": "prepare.statistics.fields", "neighbours": "prepare.neighbours", "columns": "prepare.columns"}
            missing = ", ".join(keys[need] for need in found.needs if need in keys)
            raise InputError(f"the data set {uri} has no signal {name}: prepare it again with {missing or 'this version'}")


def scales_of(manifest: Manifest, numbers: tuple[str, ...]) -> tuple[tuple[str, float, float], ...]:
    """Name, mean and deviation of each number in the training range."""
    return tuple((name, manifest.numbers[name].mean, manifest.numbers[name].deviation) for name in dict.fromkeys(numbers))
