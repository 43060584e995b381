"""The family `sparse`: SparseCTR (arXiv 2601.17836)."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ctrsink.config.model.ids import IdsSpec

Part = Literal["global", "transition", "local"]


class SparseSpec(IdsSpec):
    """Sparse attention over chunks of a long history, for all candidates in one pass (SparseCTR, arXiv 2601.17836)."""

    GROUPS = ("ids", "embedding", "model")

    family: Literal["sparse"]
    """The kind of model, which decides on the other keys of this section."""
    width: int = Field(default=32, ge=1)
    """Of the vectors of behaviours, targets and profile; a multiple of `heads`."""
    heads: int = Field(default=8, ge=1)
    """Of the attention."""
    blocks: int = Field(default=2, ge=1)
    """Layers."""
    chunks: int = Field(default=16, ge=1)
    """Parts that a history is divided into, the latest, which still grows, among them."""
    chunking: Literal["time", "equal"] = "time"
    """`time`: between the longest gaps. `equal`: all parts but the latest have as many behaviours as one another."""
    branches: tuple[Part, ...] = ("global", "transition", "local")
    """What a position reads: `global` a summary of each chunk, `transition` the end of each chunk, `local` the latest behaviours
    and the user's profile."""
    transition: int = Field(default=2, ge=1)
    """Behaviours at the end of each chunk that the branch `transition` reads."""
    window: int = Field(default=64, ge=1)
    """Latest behaviours that the branch `local` reads."""
    time_bias: bool = True
    """Whether attention knows how far apart two events are, in time, hour of the day and weekend."""
    layers: tuple[int, ...] = (64, 32)
    """Inner widths of the network from candidate and profile to the logit."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of that network's inner activations that is dropped in training."""

    @field_validator("branches")
    @classmethod
    def _some(cls, value: tuple[Part, ...]) -> tuple[Part, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name at least one of global, transition and local, each once")
        return value

    @model_validator(mode="after")
    def _divides(self) -> "SparseSpec":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self
