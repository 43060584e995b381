"""The family `din`: Deep Interest Network (arXiv 1706.06978)."""

from typing import Literal

from pydantic import Field

from ctrsink.config.model.ids import IdsSpec


class DinSpec(IdsSpec):
    """Attention of a target to each behaviour, by a small network on both (DIN, arXiv 1706.06978)."""

    GROUPS = ("ids", "embedding", "model")

    family: Literal["din"]
    """The kind of model, which decides on the other keys of this section."""
    width: int = Field(default=64, ge=1)
    """Of the vectors of behaviours and targets."""
    attention_layers: tuple[int, ...] = Field(default=(64, 32), min_length=1)
    """Inner widths of the network that weighs a behaviour."""
    layers: tuple[int, ...] = (128, 64)
    """Inner widths of the network from interest and target to the logit."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of that network's inner activations that is dropped in training."""
