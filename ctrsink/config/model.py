"""Sections of the model: backbone, sinks, inter-sink bias, LoRA."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ctrsink.config.base import Section
from ctrsink.config.data import Signal


class BackboneSpec(Section):
    """The decoder: exactly one of `path` (Hugging Face id or folder) and `config` (random weights from a seed)."""

    path: str | None = None
    """Hugging Face id, or local folder, of a decoder with weights in safetensors."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    config: dict[str, Any] | None = None
    """Fields of a transformers configuration, `model_type` among them; the vocabulary size comes from the tokenizer."""

    @model_validator(mode="after")
    def _one(self) -> "BackboneSpec":
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of path and config")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs a model_type, for example llama")
        return self


class SinkSpec(Section):
    """Sink tokens after each behaviour (CTR-Sink, arXiv 2508.03668)."""

    signals: tuple[Signal, ...] = ("previous_gap",)
    """Signals whose embeddings are summed."""
    buckets: int = Field(default=100, ge=2)
    """Rows of each signal's embedding table."""
    embedding_size: int = Field(default=256, ge=1)
    """Width of the tables, before the map to the width of the backbone."""

    @field_validator("signals")
    @classmethod
    def _some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name at least one signal, each once; for constant sinks use [none]")
        return value


class BiasSpec(Section):
    """Inter-sink attention (CTR-Sink, arXiv 2508.03668, inter-sink attention): a learned addition to the logits between sinks."""

    layers: float = Field(default=0.5, gt=0, le=1)
    """Share of the layers, from the first on, that carry it."""
    gamma: float = 1.0
    """Start of the learned scale of each layer."""
    causal: bool = True
    """False is the published form, in which every sink slot of the batch takes part; for parity only."""


class LoraSpec(Section):
    """Low-rank adapters on the backbone's linear layers (PEFT)."""

    rank: int = Field(default=8, ge=1)
    """Inner width of an adapter."""
    alpha: float = Field(default=16.0, gt=0)
    """An adapter's output is scaled by `alpha / rank`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped in training."""
    targets: tuple[str, ...] | None = None
    """Names of the layers, for example `[q_proj, v_proj]`; null: every linear layer of the decoder, by the names it has there."""

    @field_validator("targets")
    @classmethod
    def _some(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not value:
            raise ValueError("name at least one layer, or null for every linear layer")
        return value


class ModelSpec(Section):
    """The CTR model."""

    backbone: BackboneSpec
    attention: Literal["sdpa", "blocks", "flex"] = "sdpa"
    """Attention backend in training. `blocks` is the fastest on a CPU with long sequences or a window, above all in bf16 on a
    processor that has instructions for it (`train.precision`); `flex` is one fused kernel and needs CUDA; restored and exported
    models always run on `sdpa`. Other backends would drop the inter-sink bias without a word."""
    sinks: SinkSpec | None = SinkSpec()
    """null is the plain language model (LM-CTR)."""
    bias: BiasSpec | None = BiasSpec()
    """null: none, as it must be where `sinks` is null."""
    temporal: bool = False
    """A learned bias from targets to sinks by gap, hour of day and weekday, per head (SparseCTR, arXiv 2601.17836). What a
    `per_user` sequence cannot say by signals, because its targets share them."""
    window: int | None = Field(default=None, ge=1)
    """A position attends to its own event, the prefix and this many events before it; null: to all of its sequence."""
    lora: LoraSpec | None = None
    """null: no adapters."""
    trust_remote_code: bool = False
    """Run the Python code that a model from the hub brings along; only for models whose code you have read."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""

    @field_validator("attention", mode="before")
    @classmethod
    def _keeps_bias(cls, value: Any) -> Any:
        if isinstance(value, str) and (value == "eager" or value.startswith("flash")):
            raise ValueError(f"the {value} backend drops the inter-sink bias without a word; allowed: sdpa, blocks or flex")
        return value

    @model_validator(mode="after")
    def _bias_needs_sinks(self) -> "ModelSpec":
        if self.bias is not None and self.sinks is None:
            raise ValueError("bias acts between sinks: set bias to null where sinks is null")
        if self.temporal and self.sinks is None:
            raise ValueError("temporal acts from targets to sinks: set it to false where sinks is null")
        return self
