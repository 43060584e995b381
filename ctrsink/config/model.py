"""Sections of the model: backbone, sinks, inter-sink bias, LoRA."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ctrsink.config.base import Section
from ctrsink.config.signals import ColumnName, SignalName
from ctrsink.features.columns import Column
from ctrsink.features.registry import SIGNALS, Side, of_kind, signal

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", *_DEPTHS)
_MOST_LAYERS = 1000


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

    @field_validator("config")
    @classmethod
    def _can_be_built(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        # What can be told without transformers, and what would keep it busy for ever; the rest is model.build.check_model's.
        for name, size in (value or {}).items():
            if name in _SIZES and isinstance(size, int | float) and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
            if name in _DEPTHS and isinstance(size, int | float) and size > _MOST_LAYERS:
                raise ValueError(f"{name} must be at most {_MOST_LAYERS}, got {size:g}")
            if name.endswith("dropout") and isinstance(size, int | float) and not 0 <= size < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {size:g}")
        return value


class _Told(Section):
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


class SinkSpec(_Told):
    """Sink tokens after each behaviour (CTR-Sink, arXiv 2508.03668)."""

    signals: tuple[SignalName, ...] = ("feedback", "deviation", "item_mean", "item_count")
    """What a sink tells of its behaviour: the sum of an embedding of each bucket or category and a map of the numbers."""
    buckets: int = Field(default=100, ge=2)
    """Rows of the embedding table of each signal that is a bucket, or a category of few values such as `feedback` and `hour`."""
    embedding_size: int = Field(default=256, ge=1)
    """Width of the tables, before the map to the width of the backbone."""

    @field_validator("signals")
    @classmethod
    def _some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return _told_of(value, "behaviour", "for constant sinks use [none]")

    @model_validator(mode="after")
    def _clock_fits(self) -> "SinkSpec":
        for name in self.signals:
            values = signal(name).values or 0
            if self.buckets < values:
                raise ValueError(f"{name} has {values} values, more than buckets {self.buckets}")
        return self


class TargetSpec(_Told):
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
        return _told_of(value, "target", "for none set model.target to null")


def _told_of(names: tuple[str, ...], side: Side, instead: str) -> tuple[str, ...]:
    if not names or len(set(names)) != len(names):
        raise ValueError(f"name at least one signal, each once; {instead}")
    for name in names:
        if side not in signal(name).sides:
            allowed = ", ".join(known for known, found in SIGNALS.items() if side in found.sides)
            raise ValueError(f"{name} cannot be told of a {side}; allowed: {allowed}")
    return names


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
    target: TargetSpec | None = None
    """null: a target is its text alone."""
    similarity: Literal["neighbours", "vectors"] | None = None
    """A learned bias from targets to the sinks of similar items, per head. `neighbours`: by what users thought of both
    (`prepare.neighbours`). `vectors`: by their texts (`prepare.encoder`). null: none."""
    base: ColumnName | None = None
    """A column of the log, `log.NAME`, with the logit that the present ranker gave: the model learns what to add to it. An event
    without one has 0. It may be among `target.signals` as well. null: none."""
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

    @property
    def ids(self) -> tuple[str, ...]:
        """Signals that say which item or user it is, told to sinks or to targets."""
        return (*(self.sinks.ids if self.sinks else ()), *(self.target.ids if self.target else ()))

    @field_validator("base")
    @classmethod
    def _is_logged(cls, value: str | None) -> str | None:
        column = Column.parse(value) if value is not None else None
        if column is not None and (column.kind, column.of) != ("number", "log"):
            raise ValueError(f"{value} is no number of the log: name its column as log.NAME")
        return value

    @model_validator(mode="after")
    def _bias_needs_sinks(self) -> "ModelSpec":
        if self.bias is not None and self.sinks is None:
            raise ValueError("bias acts between sinks: set bias to null where sinks is null")
        if self.temporal and self.sinks is None:
            raise ValueError("temporal acts from targets to sinks: set it to false where sinks is null")
        if self.similarity is not None and self.sinks is None:
            raise ValueError("similarity acts from targets to sinks: set it to null where sinks is null")
        return self
