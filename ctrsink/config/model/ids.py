"""What the sections of all families that read ids and signals, and no text, share."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from ctrsink.config.model.family import FamilySpec
from ctrsink.config.model.told import check_shared, told_of
from ctrsink.config.signals import SignalName
from ctrsink.features.registry import of_kind, signal

if TYPE_CHECKING:
    from ctrsink.config.run import RunSpec

_MOST_ROWS = 2**31  # of a sharded table


class IdsSpec(FamilySpec):
    """What behaviours and targets are, beside each other: signals that both have share one table of embeddings."""

    behaviours: tuple[SignalName, ...] = ("item_id", "feedback", "deviation", "item_mean", "item_count", "previous_gap")
    """Signals of each behaviour; see docs/signals.md."""
    target: tuple[SignalName, ...] = ("item_id", "item_mean", "item_count", "expected", "user_res", "user_count")
    """Signals of each target."""
    rows: int = Field(default=10_000, ge=2)
    """Rows of the embedding table of each id and of each hashed column; two values may share one. Row 0 is for the unknown."""
    buckets: int = Field(default=100, ge=2)
    """Rows of the embedding table of each signal that is a bucket, and of `feedback`, of which a log may bring new values."""
    embedding_size: int = Field(default=32, ge=1)
    """Width of the tables."""
    embedding_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the tables at the start (default: 1 / sqrt(embedding_size)). Where ids carry the prediction, a rare
    one keeps much of what it was drawn: 0.02 gave `din` on ids alone +0.0026 AUC on MovieLens-1M."""
    id_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the ids, `item_id` and `user_id`, that is hidden in training, so that the model does without those of new ones."""
    id_tables: Literal["dense", "sharded"] = "dense"
    """Where the tables of ids lie. `dense`: whole on every worker, trained by AdamW as all else. `sharded`: by row over the
    workers, outside DeepSpeed, trained by row-wise Adagrad in the rows that a batch names: for millions of rows."""

    @field_validator("behaviours")
    @classmethod
    def _of_behaviours(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return told_of(value, "behaviour", "a behaviour needs one")

    @field_validator("target")
    @classmethod
    def _of_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return told_of(value, "target", "a target needs one")

    @property
    def categories(self) -> tuple[str, ...]:
        """Signals with a table of embeddings, of both sides, each once."""
        return of_kind(tuple(dict.fromkeys((*self.behaviours, *self.target))), numbers=False)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(name for name in self.categories if signal(name).identity)

    @property
    def absent(self) -> dict[str, str]:
        return {} if self.ids or "ids" not in self.GROUPS else {"ids": "no signal is item_id or user_id"}

    def check(self, run: "RunSpec") -> None:
        check_shared(self.behaviours, "model.behaviours", run)
        if run.data.text_history is not None:
            raise ValueError("data.text_history: this family reads no text: leave it out")
        if self.id_tables == "sharded":
            self._check_sharded(run)

    def _check_sharded(self, run: "RunSpec") -> None:
        if not self.ids:
            raise ValueError("model.id_tables sharded: no signal is item_id or user_id: leave it out")
        if self.rows > _MOST_ROWS:
            raise ValueError(f"model.rows {self.rows}: a sharded table has at most {_MOST_ROWS}")
        for stage in run.stages:
            if stage.trainable == ("ids",):
                raise ValueError(
                    f"stages.{stage.name}: trains sharded tables alone, and DeepSpeed needs a parameter: add another group"
                )
