"""The exported model as a transformers class with its own `model_type`: a plain load is right or fails, never silently wrong.

Importing this module registers both classes with AutoConfig and AutoModel; it needs neither PEFT nor anything of training.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from ctrsink.attention import sdpa
from ctrsink.config.model import BackboneSpec, ModelSpec
from ctrsink.config.stages import ReadoutSpec
from ctrsink.families.decoder.model import CTRModel
from ctrsink.families.decoder.supported import guard_length
from ctrsink.sequences.batch import Batch

FORMAT = "ctrsink-model/3"


class CTRSinkConfig(PretrainedConfig):
    """Everything that turns a request into a probability beside the weights; plain values, as they stand in config.json."""

    model_type = "ctrsink"

    format: str = FORMAT
    backbone: dict[str, Any] | None = None
    """The backbone's transformers configuration, `model_type` among its fields."""
    sinks: dict[str, Any] | None = None
    """SinkSpec, null for the plain language model."""
    bias: dict[str, Any] | None = None
    """BiasSpec."""
    target: dict[str, Any] | None = None
    """TargetSpec."""
    similarity: str | None = None
    temporal: bool = False
    window: int | None = None
    readout: dict[str, Any] | None = None
    """ReadoutSpec of the run's last stage."""
    layout: dict[str, Any] | None = None
    """`ctrsink.dataset.layout.Layout`."""
    text: dict[str, Any] | None = None
    """TextSpec: how items and feedback were rendered."""
    prefix_tokens: list[int] | None = None
    """Tokens at the start of every sequence."""
    tokenizer_fingerprint: str | None = None
    feedback_texts: list[str] | None = None
    """What each value of the signal `feedback` was rendered as, in the order of its numbers."""
    knowledge: dict[str, Any] | None = None
    """What is needed of items, see `ctrsink.serve.knowledge`; None where no signal is of items."""
    encoder: dict[str, Any] | None = None
    """`max_tokens` and `fingerprint` of the text encoder in the folder `encoder`, where sequences depend on items' vectors."""

    def model_spec(self) -> ModelSpec:
        """The ModelSpec of the merged model: no LoRA, a backbone from its configuration."""
        parts = {name: getattr(self, name) for name in ("sinks", "target", "bias", "similarity", "temporal", "window")}
        return ModelSpec.model_validate({"backbone": BackboneSpec(config=self.backbone), **parts})


class CTRSinkModel(PreTrainedModel):
    """Batch -> logits [B, T]; the weights are those of a CTRModel without LoRA."""

    config_class = CTRSinkConfig
    main_input_name = "batch"
    base_model_prefix = "ctr"
    _supports_sdpa = True
    # The backbone alone is stored in bfloat16: the rest is small, and was trained in fp32.
    _keep_in_fp32_modules_strict = ["ctr.head", "ctr.sinks", "ctr.target", "ctr.biases", "ctr.temporal", "ctr.similarity"]  # noqa: RUF012

    def __init__(self, config: CTRSinkConfig) -> None:
        super().__init__(config)
        fields = dict(config.backbone or {})
        backbone_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        backbone = AutoModel.from_config(backbone_config, attn_implementation=sdpa.BACKEND)
        guard_length(backbone)
        self.ctr = CTRModel(backbone, config.model_spec())
        self.readout = ReadoutSpec.model_validate(config.readout)
        self.post_init()

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [B, T] in fp32, computed as in training: a bfloat16 backbone runs under autocast."""
        self.ctr.mixed_precision = self.ctr.backbone.dtype == torch.bfloat16
        return self.ctr(batch, self.readout)[1]


AutoConfig.register(CTRSinkConfig.model_type, CTRSinkConfig)
AutoModel.register(CTRSinkConfig, CTRSinkModel)
