"""What every family may be told of behaviours and targets: signals."""

from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from ctrsink.config.base import Section
from ctrsink.config.signals import SignalName
from ctrsink.features.registry import SIGNALS, Side, of_kind, signal

if TYPE_CHECKING:
    from ctrsink.config.run import RunSpec


class Told(Section):
    """Who is told signals."""

    signals: tuple[SignalName, ...]
    """Names of them."""
    id_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the ids, `item_id` and `user_id`, that is hidden in training, so that the model does without those of new ones."""

    rows: int = Field(default=1000, ge=2)
    """Rows of the embedding table of each id and of each hashed column; two values may share one."""

    @property
    def categories(self) -> tuple[str, ...]:
        """Signals with an embedding table."""
        return of_kind(self.signals, numbers=False)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Signals that are z-scores."""
        return of_kind(self.signals, numbers=True)

    @property
    def ids(self) -> tuple[str, ...]:
        """Signals that say which item or user it is."""
        return tuple(name for name in self.signals if signal(name).identity)


class TargetSpec(Told):
    """What a target is told beside its text: a vector at its last token, and its numbers once more at the head."""

    signals: tuple[SignalName, ...] = ("item_mean", "item_count", "affinity")
    """Numbers, and categories such as `hour`; see docs/signals.md."""
    embedding_size: int = Field(default=64, ge=1)
    """Width of the tables of categories."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the head's inner activations that is dropped in training."""

    @field_validator("signals")
    @classmethod
    def _some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return told_of(value, "target", "for none set model.target to null")


def told_of(names: tuple[str, ...], side: Side, instead: str) -> tuple[str, ...]:
    """The names, if each may be told of the side; `instead` says what to write for none."""
    if not names or len(set(names)) != len(names):
        raise ValueError(f"name at least one signal, each once; {instead}")
    for name in names:
        if side not in signal(name).sides:
            allowed = ", ".join(known for known, found in SIGNALS.items() if side in found.sides)
            raise ValueError(f"{name} cannot be told of a {side}; allowed: {allowed}")
    return names


def check_shared(signals: tuple[str, ...], key: str, run: "RunSpec") -> None:
    """Refuse signals of behaviours that depend on the target, where targets share a history; raises ValueError."""
    if run.data.examples == "per_request" and "similarity" in signals:
        raise ValueError(
            f"{key}: similarity depends on the target's item, which the history of per_request sequences is "
            "shared by; use data.examples per_target, or another signal"
        )
    if run.data.examples != "per_user":
        return
    for name in signals:
        if signal(name).depends_on_target:
            raise ValueError(
                f"{key}: {name} depends on the target, which per_user sequences share a history of; "
                "use previous_gap, feedback or another that does not, or data.examples per_target"
            )
