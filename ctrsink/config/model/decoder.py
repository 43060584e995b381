"""The family `decoder`: a language model with sinks; backbone, sinks, inter-sink bias, LoRA."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ctrsink.config.base import Section
from ctrsink.config.model.family import FamilySpec
from ctrsink.config.model.told import TargetSpec, Told, check_shared, told_of
from ctrsink.config.signals import SignalName
from ctrsink.features.registry import signal

if TYPE_CHECKING:
    from ctrsink.config.run import RunSpec

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", *_DEPTHS)
_MOST_LAYERS = 1000


class BackboneSpec(Section):
    """The decoder: exactly one of `path` (Hugging Face id or folder) and `config` (random weights from a seed)."""

    path: str | None = None
    """Hugging Face id, or local folder, of a decoder with weights in safetensors."""
    revision: str | None = None
    """Commit or tag of a hub model; null: its newest."""
    config: dict[str, Any] | None = None
    """Fields of a transformers configuration, `model_type` among them; the vocabulary size comes from the tokenizer."""

    @property
    def pinned(self) -> bool:
        """Whether `revision` is a commit, which is the same everywhere and for ever."""
        return re.fullmatch("[0-9a-f]{40}", self.revision or "") is not None

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
        # What can be told without transformers, and what would keep it busy for ever; the rest is for build.check_model.
        for name, size in (value or {}).items():
            if name in _SIZES and isinstance(size, int | float) and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
            if name in _DEPTHS and isinstance(size, int | float) and size > _MOST_LAYERS:
                raise ValueError(f"{name} must be at most {_MOST_LAYERS}, got {size:g}")
            if name.endswith("dropout") and isinstance(size, int | float) and not 0 <= size < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {size:g}")
        return value


class SinkSpec(Told):
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
        return told_of(value, "behaviour", "for constant sinks use [none]")

    @model_validator(mode="after")
    def _clock_fits(self) -> "SinkSpec":
        for name in self.signals:
            values = signal(name).values or 0
            if self.buckets < values:
                raise ValueError(f"{name} has {values} values, more than buckets {self.buckets}")
        return self


class BiasSpec(Section):
    """Inter-sink attention (CTR-Sink, arXiv 2508.03668, inter-sink attention): a learned addition to the logits between sinks."""

    layers: float = Field(default=0.5, gt=0, le=1)
    """Share of the layers, from the first on, that carry it."""
    gamma: float = 1.0
    """Start of the learned scale of each layer."""
    causal: bool = True
    """False is the published form, in which every sink slot of the batch takes part; for parity only."""


class SparseSinksSpec(Section):
    """Attention to a long history by its sinks: the latest, the last of each chunk, and a mean over each chunk, at any length as
    many keys (SparseCTR, arXiv 2601.17836, over the sinks of CTR-Sink: our own). The text of other events is not seen, whatever a
    stage's readout is.
    """

    chunks: int = Field(default=16, ge=1)
    """Parts that a history is divided into, between its longest gaps, for every position anew, the latest among them. Of each
    the mean of its sinks' keys and values is read."""
    transition: int = Field(default=2, ge=1)
    """Sinks at the end of each part that are read themselves; at most `window`."""
    window: int = Field(default=64, ge=1)
    """Latest sinks that are read themselves, whatever part they are in."""
    summary_bias: bool = False
    """A learned addition to the attention logits of the means, per head, which starts at 0: a mean of a hundred behaviours is
    one key. Belongs to the group `bias`."""

    @model_validator(mode="after")
    def _ends_are_local(self) -> "SparseSinksSpec":
        if self.transition > self.window:
            raise ValueError(f"transition {self.transition} is more than window {self.window}, whose sinks are all read")
        return self


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


class DecoderSpec(FamilySpec):
    """A decoder language model that reads the history as text, with sinks (CTR-Sink, arXiv 2508.03668)."""

    GROUPS = ("sink", "bias", "head", "ids", "lora", "norm", "backbone")

    family: Literal["decoder"] = "decoder"
    """The kind of model, which decides on the other keys of this section."""
    backbone: BackboneSpec
    attention: Literal["sdpa", "blocks", "flex"] = "sdpa"
    """Attention backend in training. `blocks` is the fastest on a CPU with long sequences or a window, above all in bf16 on a
    processor that has instructions for it (`train.precision`), and for CPUs alone; `flex` is one fused kernel and needs CUDA;
    restored and exported models always run on `sdpa`. Other backends would drop the inter-sink bias without a word."""
    sinks: SinkSpec | None = SinkSpec()
    """null is the plain language model (LM-CTR)."""
    bias: BiasSpec | None = BiasSpec()
    """null: none, as it must be where `sinks` is null."""
    target: TargetSpec | None = None
    """null: a target is its text alone."""
    head: Literal["norm", "linear"] = "norm"
    """From a target's last state to its logit: a layer norm of its own and a linear map, or the map alone, without a constant.
    With `linear`, a model without sinks and told targets can be exported as a plain decoder that transformers alone scores with
    (`ctrsink export --form plain`)."""
    similarity: Literal["neighbours", "vectors"] | None = None
    """A learned bias from targets to the sinks of similar items, per head. `neighbours`: by what users thought of both
    (`prepare.neighbours`). `vectors`: by their texts (`prepare.encoder`). null: none."""
    temporal: bool = False
    """A learned bias from targets to sinks by gap, hour of day and weekday, per head (SparseCTR, arXiv 2601.17836). What a
    `per_user` sequence cannot say by signals, because its targets share them."""
    window: int | None = Field(default=None, ge=1)
    """A position attends to its own event, the prefix and this many events before it; null: to all of its sequence."""
    sparse: SparseSinksSpec | None = None
    """For histories of 1,000 behaviours and more, with `data.text_history: 0`, which leaves them their sinks alone. null: every
    position attends to all before it."""
    lora: LoraSpec | None = None
    """null: no adapters."""
    trust_remote_code: bool = False
    """Run the Python code that a model from the hub brings along; only for models whose code you have read, so
    `backbone.revision` must be the commit that you read."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""

    @field_validator("attention", mode="before")
    @classmethod
    def _keeps_bias(cls, value: Any) -> Any:
        if isinstance(value, str) and (value == "eager" or value.startswith("flash")):
            raise ValueError(f"the {value} backend drops the inter-sink bias without a word; allowed: sdpa, blocks or flex")
        return value

    @model_validator(mode="after")
    def _code_that_was_read(self) -> "DecoderSpec":
        path = self.backbone.path
        if self.trust_remote_code and path is not None and not Path(path).is_dir() and not self.backbone.pinned:
            raise ValueError(
                "trust_remote_code runs what the hub holds at the moment: set backbone.revision to the commit (40 hexadecimal "
                "digits) whose code you have read"
            )
        return self

    @property
    def ids(self) -> tuple[str, ...]:
        """Signals that say which item or user it is, told to sinks or to targets."""
        return (*(self.sinks.ids if self.sinks else ()), *(self.target.ids if self.target else ()))

    @model_validator(mode="after")
    def _bias_needs_sinks(self) -> "DecoderSpec":
        if self.bias is not None and self.sinks is None:
            raise ValueError("bias acts between sinks: set bias to null where sinks is null")
        if self.temporal and self.sinks is None:
            raise ValueError("temporal acts from targets to sinks: set it to false where sinks is null")
        if self.similarity is not None and self.sinks is None:
            raise ValueError("similarity acts from targets to sinks: set it to null where sinks is null")
        return self

    @model_validator(mode="after")
    def _head_fits(self) -> "DecoderSpec":
        if self.head == "linear" and self.target is not None and self.target.numbers:
            raise ValueError("numbers of a target have a head of their own: set head to norm, or leave them out of target")
        return self

    @model_validator(mode="after")
    def _sparse_fits(self) -> "DecoderSpec":
        if self.sparse is None:
            return self
        if self.sinks is None:
            raise ValueError("sparse reads a history through its sinks: set it to null where sinks is null")
        if self.window is not None:
            raise ValueError(
                "window and sparse are two rules for one attention: set window to null; sparse has a window of its own"
            )
        if self.bias is not None:
            raise ValueError("bias is a table of all pairs of sinks, as large as what sparse saves: set bias to null with sparse")
        return self

    @property
    def absent(self) -> dict[str, str]:
        summaries = self.sparse is not None and self.sparse.summary_bias
        owners = {
            "sink": (self.sinks, "model.sinks is null"),
            "bias": (self.bias or self.temporal or self.similarity or summaries, "model.bias is null"),
            "lora": (self.lora, "model.lora is null"),
            "ids": (self.ids, "no signal is item_id or user_id"),
        }
        return {group: why for group, (owner, why) in owners.items() if not owner}

    def check(self, run: "RunSpec") -> None:
        self._check_signals(run)
        if self.bias is not None and not self.bias.causal and run.data.examples == "per_user":
            raise ValueError("model.bias.causal: false shows a target later behaviours in per_user sequences; use per_target")
        if self.attention == "flex" and run.runtime.device == "cpu":
            raise ValueError("model.attention: flex has no backward pass on a CPU; use blocks, or runtime.device cuda")
        for stage in run.stages:
            if stage.readout.over == "sinks" and self.sinks is None:
                raise ValueError(f"stages.{stage.name}: readout over sinks needs sinks, but model.sinks is null")
            if self.lora is not None and "backbone" in stage.trainable and "lora" in stage.trainable:
                raise ValueError(f"stages.{stage.name}: lora and backbone together train the same weights twice; choose one")

    def _check_signals(self, run: "RunSpec") -> None:
        if run.data.text_history is not None and self.sinks is None:
            raise ValueError("data.text_history: behaviours without a text are their sinks alone, but model.sinks is null")
        if self.sinks is not None:
            check_shared(self.sinks.signals, "model.sinks.signals", run)

    def absolute(self) -> Self:
        path = self.backbone.path
        if path is None or not Path(path).is_dir():
            return self
        return self.model_copy(update={"backbone": self.backbone.model_copy(update={"path": str(Path(path).resolve())})})
