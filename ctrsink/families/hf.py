"""An exported model of any family as a transformers class with its own `model_type`: a plain load is right or fails.

Importing this module registers the classes of all families with AutoConfig and AutoModel; it needs neither PEFT nor anything of
training.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from ctrsink.config.model import FIRST_FAMILY
from ctrsink.config.stages import Objective
from ctrsink.families.facts import Facts
from ctrsink.families.registry import FAMILIES, family_of
from ctrsink.sequences.batch import Batch

FORMAT = "ctrsink-model/4"


class ExportedConfig(PretrainedConfig):
    """Everything that turns a request into a probability beside the weights; plain values, as they stand in config.json."""

    family: str = ""
    format: str = FORMAT
    model: dict[str, Any] | None = None
    """The section `model` of the configuration, as merging has left it."""
    facts: dict[str, Any] | None = None
    """`ctrsink.families.protocol.Facts`."""
    objective: dict[str, Any] | None = None
    """Objective of the stage that made the weights."""
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


class ExportedModel(PreTrainedModel):
    """Batch -> logits [T]; the weights are those of the family's module, merged."""

    config_class = ExportedConfig
    main_input_name = "batch"
    base_model_prefix = "ctr"
    _supports_sdpa = True

    def __init__(self, config: ExportedConfig) -> None:
        super().__init__(config)
        family = family_of(config.family)
        self.ctr = family.rebuilt(config.model or {}, Facts((config.facts or {}).get("vocabulary", 0)))
        self.objective = Objective.model_validate(config.objective)
        narrow = {name for name, _ in self.ctr.named_children() if family.narrowed(f"{name}.")}
        self._keep_in_fp32_modules_strict = [f"ctr.{name}" for name, _ in self.ctr.named_children() if name not in narrow]
        self._narrow = next(iter(narrow), None)
        self.post_init()

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [T] in fp32, computed as in training: a model whose weights are bfloat16 runs under autocast."""
        if self._narrow is not None:
            self.ctr.mixed_precision = next(self.ctr.get_submodule(self._narrow).parameters()).dtype == torch.bfloat16
        logits = self.ctr(batch, self.objective).logits
        assert logits is not None
        return logits


def model_type_of(family: str) -> str:
    """What `model_type` says in config.json."""
    return "ctrsink" if family == FIRST_FAMILY else f"ctrsink-{family}"


def _classes(family: str) -> tuple[type[ExportedConfig], type[ExportedModel]]:
    name = "CTRSink" if family == FIRST_FAMILY else f"CTRSink{family.capitalize()}"
    # Annotated, or the field's own default would stay.
    of = {"model_type": model_type_of(family), "family": family, "__annotations__": {"family": str}}
    config = type(f"{name}Config", (ExportedConfig,), of)
    return config, type(f"{name}Model", (ExportedModel,), {"config_class": config})


CLASSES = {family: _classes(family) for family in FAMILIES}
"""The configuration and the model of each family."""
for _config, _model in CLASSES.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
