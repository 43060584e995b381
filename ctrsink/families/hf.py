"""An exported model of any family as a transformers class with its own `model_type`: a plain load is right or fails.

Importing this module registers the classes of all families with AutoConfig and AutoModel, and `import ctrsink` has it imported
with them (`ctrsink.auto_classes`); it needs neither PEFT nor anything of training.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from ctrsink.config.model import FIRST_FAMILY
from ctrsink.config.stages import Objective
from ctrsink.errors import InputError
from ctrsink.families.adapter import based, put, section_of
from ctrsink.families.facts import Facts
from ctrsink.families.protocol import Kept
from ctrsink.families.registry import FAMILIES, family_of
from ctrsink.sequences.batch import Batch

FORMAT = "ctrsink-model/4"
# Options of from_pretrained that change nothing of an adapter: beside its configuration those of fetching and of running code.
_UNCHANGING = (
    "adapter_kwargs", "cache_dir", "code_revision", "config", "force_download", "local_files_only", "proxies", "revision",
    "token", "trust_remote_code", "use_safetensors",
)  # fmt: skip


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
    names: dict[str, str] | None = None
    """Of a plain decoder: what its weights' names begin with, and what those of the class here begin with instead."""
    base: dict[str, Any] | None = None
    """Of an adapter: `precision` and `fingerprint` of the weights that it is for, see `ctrsink.families.adapter`."""


class ExportedModel(PreTrainedModel):
    """Batch -> logits [T]; the weights are those of the family's module, merged or, of an adapter, beside those of its base."""

    config_class = ExportedConfig
    main_input_name = "batch"
    base_model_prefix = "ctr"
    _supports_sdpa = True

    def __init__(self, config: ExportedConfig) -> None:
        super().__init__(config)
        family, facts = family_of(config.family), Facts((config.facts or {}).get("vocabulary", 0))
        self.ctr = family.rebuilt(config.model or {}, facts) if config.base is None else based(config, facts)
        self.objective = Objective.model_validate(config.objective)
        narrow = {name for name, _ in self.ctr.named_children() if family.narrowed(f"{name}.")}
        self._keep_in_fp32_modules_strict = [f"ctr.{name}" for name, _ in self.ctr.named_children() if name not in narrow]
        self._narrow = next(iter(narrow), None)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **given: Any) -> Any:
        """As transformers has it; and of a folder with an adapter, which is read in fp32.

        Args:
            base: local folder of the adapter's base; by default where its configuration has it, on this machine.

        Raises:
            InputError: see `ctrsink.families.adapter`.
        """
        base = given.pop("base", None)
        of: Any = cls.config_class
        found: Any = given.get("config") or of.from_pretrained(pretrained_model_name_or_path)
        if found.base is None:
            given |= {"key_mapping": found.names} if found.names else {}
            return super().from_pretrained(pretrained_model_name_or_path, *args, **given)
        if unread := sorted(name for name in given if not name.startswith("_") and name not in _UNCHANGING):
            raise InputError(f"an adapter is read in fp32, on its base, and has no option {unread[0]}: leave it out")
        found.model = family_of(found.family).on_base(section_of(found), base).model_dump(mode="json")
        model = cls(found)
        put(model.ctr, found, pretrained_model_name_or_path)
        return model.eval()

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [T] in fp32, computed as in training: a model whose weights are bfloat16 runs under autocast."""
        self._set_precision()
        logits = self.ctr(batch, self.objective).logits
        assert logits is not None
        return logits

    def recall(self, batch: Batch, histories: Sequence[Kept], of: list[int]) -> tuple[torch.Tensor, Sequence[Kept]]:
        """See CTRModule.recall."""
        self._set_precision()
        return self.ctr.recall(batch, self.objective, histories, of)

    def paid(self, batch: Batch) -> torch.Tensor | None:
        """See CTRModule.paid."""
        self._set_precision()
        return self.ctr.paid(batch, self.objective)

    def _set_precision(self) -> None:
        if self._narrow is not None:
            self.ctr.mixed_precision = next(self.ctr.get_submodule(self._narrow).parameters()).dtype == torch.bfloat16


def name_of(family: str) -> str:
    """What `model_type` said in config.json until it said more."""
    return "ctrsink" if family == FIRST_FAMILY else f"ctrsink-{family}"


def model_type_of(family: str) -> str:
    """What `model_type` says in config.json: of all that stands there, what transformers shows where it is not known."""
    return f"{name_of(family)} (import ctrsink first)"


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
    CONFIG_MAPPING.register(name_of(_config.family), _config)
    AutoModel.register(_config, _model)
