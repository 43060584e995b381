"""The family `hstu`: a causal transformer over ids (Hierarchical Sequential Transduction Units, arXiv 2402.17152)."""

from typing import Literal

from pydantic import Field, model_validator

from ctrsink.config.model.ids import IdsSpec


class HstuSpec(IdsSpec):
    """A causal transformer over behaviours whose attention has no softmax, and targets that ask it (HSTU, arXiv 2402.17152)."""

    GROUPS = ("ids", "embedding", "model")

    family: Literal["hstu"]
    """The kind of model, which decides on the other keys of this section."""
    width: int = Field(default=64, ge=1)
    """Of the states, divisible by `heads`."""
    heads: int = Field(default=2, ge=1)
    """Of the attention."""
    blocks: int = Field(default=2, ge=1)
    """Layers."""
    layers: tuple[int, ...] = (64,)
    """Inner widths of the network from a target's state to the logit."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the activations that is dropped in training, of each layer's output and in the network to the logit."""

    @model_validator(mode="after")
    def _divides(self) -> "HstuSpec":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self
