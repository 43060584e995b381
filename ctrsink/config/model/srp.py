"""The family `srp`: a pre-trained bidirectional transformer over behaviours that candidates read (arXiv 2407.19658)."""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from ctrsink.config.model.ids import IdsSpec
from ctrsink.features.columns import Column
from ctrsink.features.registry import of_kind

if TYPE_CHECKING:
    from ctrsink.config.run import RunSpec
    from ctrsink.config.stages import StageSpec

MaskGroup = Literal["item", "behaviour"]
"""Fields of a behaviour that are hidden together."""
MASK_GROUPS: tuple[MaskGroup, ...] = ("item", "behaviour")


def mask_group(name: str) -> MaskGroup | Literal["both"]:
    """`item` where the signal's value is a property of the item, else `behaviour`: feedback, time, what the log says.

    `both`: it sets one against the other, and would give away either; it is hidden where one of them is.
    """
    if name in ("deviation", "expected", "field_res"):
        return "both"
    column = Column.parse(name)
    of_item = name in ("item_id", "item_mean", "item_count") or (column is not None and column.of == "item")
    return "item" if of_item else "behaviour"


class SrpSpec(IdsSpec):
    """Fields of behaviours that were hidden are foretold first, then clicks (SRP4CTR, arXiv 2407.19658)."""

    GROUPS = ("ids", "embedding", "encoder", "cross", "queries", "tower", "cloze")
    OBJECTIVES = ("cloze", "click")

    family: Literal["srp"]
    """The kind of model, which decides on the other keys of this section."""
    width: int = Field(default=64, ge=1)
    """Of the vectors of behaviours, candidates and queries."""
    layers: int = Field(default=2, ge=1)
    """Of the encoder, and as many for candidates and queries."""
    heads: int = Field(default=4, ge=1)
    """Of every attention; they divide `width`."""
    inner: int = Field(default=256, ge=1)
    """Inner width of the feed-forward networks."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of activations that is dropped in training."""
    max_history: int = Field(default=200, ge=1)
    """Positions that have an embedding, counted from the latest behaviour; `data.history` may not be more."""
    share_keys: bool = True
    """Candidates read the encoder's own keys and values; false: each layer has a second pair of projections for them."""
    queries: int = Field(default=8, ge=0)
    """Learned vectors that gather the history before the tower; 0: none, the candidate alone has read it."""
    tower: tuple[int, ...] = Field(default=(128, 64), min_length=1)
    """Inner widths of the network from candidate, queries and numbers to the logit."""
    mask_ratio: float = Field(default=0.2, gt=0, lt=1)
    """`cloze`: share of the behaviours whose fields of the item are hidden, and, drawn apart, share whose other fields are."""
    negatives: int = Field(default=4096, ge=1)
    """`cloze`: rows that a hidden id, or value of a hashed column, is told from in training (sampled softmax); all of them where
    `rows` is no more. Validation always takes all."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self

    @property
    def foretold(self) -> dict[MaskGroup, tuple[str, ...]]:
        """Categories of behaviours by the group that they are hidden in: what `cloze` foretells."""
        names = of_kind(self.behaviours, numbers=False)
        return {group: tuple(name for name in names if mask_group(name) == group) for group in MASK_GROUPS}

    @property
    def ids(self) -> tuple[str, ...]:
        """Those of behaviours: the tables that targets alone have belong to what reads targets."""
        return tuple(name for name in super().ids if name in self.behaviours)

    @property
    def absent(self) -> dict[str, str]:
        return super().absent | ({} if self.queries else {"queries": "model.queries is 0"})

    def check(self, run: "RunSpec") -> None:
        super().check(run)
        if self.id_tables == "sharded":
            raise ValueError("model.id_tables sharded: the family srp foretells ids, for which it needs whole tables: take dense")
        data = run.data
        if data.examples == "per_user":
            raise ValueError(
                "data.examples per_user: the encoder reads a history in both directions, so targets would see what came later; "
                "use per_request or per_target"
            )
        key, kept = ("history", data.history) if data.retrieve is None else ("retrieve", data.retrieve)
        if kept > self.max_history:
            raise ValueError(f"data.{key} {kept} is more than the {self.max_history} positions of model.max_history: raise that")
        for stage in run.stages:
            self._check_stage(stage, kept)

    def _check_stage(self, stage: "StageSpec", kept: int) -> None:
        """What a stage trains its objective must use: ZeRO waits for the gradient of every parameter that is trained."""
        key = f"stages.{stage.name}"
        if stage.objective == "click":
            if "cloze" in stage.trainable:
                raise ValueError(f"{key}: objective click does not use the group cloze: leave it out of trainable")
            return
        unused = [group for group in stage.trainable if group in ("cross", "queries", "tower")]
        if unused:
            raise ValueError(
                f"{key}: objective cloze does not use the group {unused[0]}: it trains ids, embedding, encoder and cloze only"
            )
        if "cloze" not in stage.trainable:
            raise ValueError(f"{key}: objective cloze needs its heads trained: add cloze to trainable")
        if not any(self.foretold.values()):
            raise ValueError(
                f"{key}: objective cloze foretells categories, and model.behaviours has none: add one, such as item_id"
            )
        if "similarity" in self.behaviours:
            raise ValueError(f"{key}: objective cloze hides items, and the signal similarity would give them away: leave it out")
        if kept == 0:
            raise ValueError(f"{key}: objective cloze foretells fields of behaviours, and data.history is 0: raise it")
