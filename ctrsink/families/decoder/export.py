"""What is left of a decoder when LoRA is merged and its backbone is described by its configuration."""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

from ctrsink.config.model import DecoderSpec
from ctrsink.dataset.layout import Layout
from ctrsink.errors import InputError
from ctrsink.families.decoder.model import CTRModel, backend_of
from ctrsink.families.decoder.supported import guard_length
from ctrsink.families.protocol import CTRModule, Merged


def merged(module: CTRModule, model: DecoderSpec) -> Merged:
    """See Family.merged.

    Raises:
        InputError: the architecture is none of transformers' own.
    """
    from ctrsink.families.decoder.merge import merged_weights  # an exported model is loaded without PEFT

    assert isinstance(module, CTRModel)
    config: Any = module.backbone.config
    require_known(config)
    weights, layers = merged_weights(module)
    return Merged(portable_section(model) | {"backbone": {"config": plain_fields(config)}, "lora": None}, weights, layers)


def require_known(config: Any) -> None:
    """Raise InputError where the backbone's architecture is none of transformers' own."""
    if config.model_type not in CONFIG_MAPPING:
        raise InputError(f"model.backbone: transformers itself has no architecture {config.model_type}, so it cannot be exported")


def portable_section(model: DecoderSpec) -> dict[str, Any]:
    """The section in plain values, without what is of training alone."""
    return model.model_dump(mode="json") | {"attention": "sdpa", "trust_remote_code": False, "gradient_checkpointing": False}


def plain_fields(config: Any) -> dict[str, Any]:
    """A backbone's configuration; where the weights came from is a path of this machine, their type that of what is exported."""
    told = ("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype")
    return {key: value for key, value in config.to_dict().items() if key not in told}


def rebuilt(plain: dict[str, Any]) -> CTRModel:
    """The model of such a section, before it has its weights."""
    model = DecoderSpec.model_validate(plain)
    fields = dict(model.backbone.config or {})
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    backbone = AutoModel.from_config(config, attn_implementation=backend_of(model))
    guard_length(backbone)
    return CTRModel(backbone, model)


def described(module: CTRModule, model: DecoderSpec, layout: Layout) -> list[str]:
    """Sentences for the model card."""
    assert isinstance(module, CTRModel)
    backbone: Any = module.backbone
    source = model.backbone
    origin = "trained from random weights" if source.path is None else f"from `{source.path.rstrip('/').rsplit('/', 1)[-1]}`"
    parts = [f"A decoder ({backbone.config.model_type}, {origin}) that predicts clicks from a user's history as text."]
    if model.sinks is not None:
        bias = f", inter-sink bias in {len(module.biases)} layers" if module.biases else ""
        parts.append(f"CTR-Sink (arXiv 2508.03668): a sink after each behaviour, signals {', '.join(model.sinks.signals)}{bias}.")
    if model.target is not None:
        parts.append(f"Targets are told {', '.join(model.target.signals)}.")
    if model.similarity is not None:
        of = {"neighbours": "what users thought of both", "vectors": "their texts"}[model.similarity]
        parts.append(f"Targets look for the sinks of items that are similar by {of}.")
    if (sparse := model.sparse) is not None:
        parts.append(
            f"A history is read by chunks, between its longest gaps: a mean of the sinks of each of {sparse.chunks}, the last "
            f"{sparse.transition} of each, and the latest {sparse.window} sinks (SparseCTR, arXiv 2601.17836, over sinks)."
        )
    if layout.text_history is not None:
        parts.append(f"Of the behaviours before a target's sequence the latest {layout.text_history} have a text.")
    if model.lora is not None:
        parts.append(f"Trained with LoRA of rank {model.lora.rank}.")
    return parts
