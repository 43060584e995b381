"""From a DecoderSpec to a CTRModel: backbone from a hub id, a folder or a configuration; LoRA; everything from one seed."""

import warnings
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from ctrsink.config.model import DecoderSpec, LoraSpec
from ctrsink.errors import InputError, did_you_mean, first_line
from ctrsink.families.decoder.model import CTRModel, backend_of, decoder_layers
from ctrsink.families.decoder.supported import check_backend, check_config, check_layers, guard_length
from ctrsink.families.parameters import DTYPES

_TOKENIZER_FIELDS = frozenset({"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"})
_COMMON_FIELDS = frozenset({"head_dim", "rope_theta", "rope_scaling"})  # understood also where a configuration does not list them
_MOST_PARAMETERS = 10**13


def build_model(spec: DecoderSpec, vocabulary: int, seed: int, precision: str = "fp32") -> CTRModel:
    """A CTRModel whose every random weight comes from `seed`, so that all ranks and all restarts build the same one.

    Args:
        vocabulary: size of the tokenizer; used by a backbone from `config`, checked against a pretrained one.
        precision: of the backbone's weights and of matrix products; sink, bias, head and LoRA are fp32.

    Raises:
        InputError: the backbone cannot be loaded or is of a kind that cannot carry sinks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = _backbone(spec, vocabulary, DTYPES[precision])
        check_layers(decoder_layers(backbone))
        guard_length(backbone)
        check_backend(backbone.config, spec.attention)
        if spec.lora is not None:
            add_lora(backbone, spec.lora)
        model = CTRModel(backbone, spec)
    model.mixed_precision = precision == "bf16"
    if spec.gradient_checkpointing:
        # The newer name where there is one: the older warns, and goes away in transformers 6.
        enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def check_model(spec: DecoderSpec, vocabulary: int) -> None:
    """Build the model that `spec` describes without its memory, to refuse now what would fail in a worker.

    A backbone from `path` is not looked at: its configuration was good for those who trained it.

    Raises:
        InputError: it cannot be built, has a weight without numbers, or more of them than any machine holds.
    """
    if spec.backbone.config is None:
        return
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on weights of size 0
            model = build_model(spec, vocabulary, 0)
    except InputError:
        raise
    except Exception as error:  # transformers and torch raise anything, and the configuration is all they were given
        raise InputError(
            f"model.backbone.config: the model cannot be built ({type(error).__name__}: {_one_line(error)})"
        ) from None
    text: Any = model.backbone.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    heads, shared = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if heads % shared:
        raise InputError(f"model.backbone.config: {heads} num_attention_heads cannot share {shared} num_key_value_heads evenly")
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    if (empty := next((name for name, size in sizes.items() if not size), None)) is not None:
        raise InputError(f"model.backbone.config: the weights {empty} would be empty: a size is 0")
    if sum(sizes.values()) > _MOST_PARAMETERS:
        largest = max(sizes, key=lambda name: sizes[name])
        raise InputError(
            f"model: {sum(sizes.values()):.3g} parameters are more than any machine holds, {sizes[largest]:.3g} of them in "
            f"{largest}: lower its sizes"
        )


def backbone_config(spec: DecoderSpec, vocabulary: int) -> PretrainedConfig:
    """The configuration of the backbone, before any weight is made or read.

    Raises:
        InputError: there is none, it has a field that its architecture does not know, or its attention cannot carry sinks.
    """
    source = spec.backbone
    if source.config is not None:
        try:
            config = _from_fields(source.config, vocabulary)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise InputError(f"model.backbone.config: {_one_line(error)}") from None
        check_config(config, own_fields=True)
        return config
    assert source.path is not None  # BackboneSpec has exactly one of the two
    try:
        if spec.trust_remote_code:
            _require_own_code(source.path, source.revision or "main")
        config = AutoConfig.from_pretrained(
            source.path, revision=source.revision or "main", trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(f"model.backbone.path {source.path}: {_one_line(error)}") from None
    check_config(config, own_fields=False)
    return config


def _require_own_code(path: str, revision: str) -> None:
    """Raise InputError where a model names code of another repository, which no revision of this one holds fast."""
    fields, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    for name, places in (fields.get("auto_map") or {}).items():
        for place in [places] if isinstance(places, str) else places or []:
            if "--" in str(place):
                raise InputError(
                    f"model.backbone.path {path} takes its code ({name}) from another repository, {place.split('--')[0]}, at no "
                    "commit: make a copy with the code that you have read, and leave out trust_remote_code elsewhere"
                )


def _backbone(spec: DecoderSpec, vocabulary: int, dtype: torch.dtype) -> Any:
    source, config = spec.backbone, backbone_config(spec, vocabulary)
    # On the meta device it is a shape that is wanted: no weight is read for it.
    if source.config is not None or torch.get_default_device().type == "meta":
        try:
            return AutoModel.from_config(config, attn_implementation=backend_of(spec), dtype=dtype)
        except (ValueError, TypeError, StrictDataclassError) as error:
            named = "config" if source.path is None else f"path {source.path}"
            raise InputError(f"model.backbone.{named}: {_one_line(error)}") from None
    assert source.path is not None
    try:
        backbone = AutoModel.from_pretrained(
            source.path,
            config=config,
            attn_implementation=backend_of(spec),
            dtype=dtype,
            use_safetensors=True,
            revision=source.revision or "main",
            trust_remote_code=spec.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"model.backbone.path {source.path}: {_one_line(error)}") from None
    if vocabulary > backbone.get_input_embeddings().weight.shape[0]:
        raise InputError(
            f"model.backbone.path {source.path} has {backbone.get_input_embeddings().weight.shape[0]} token embeddings, "
            f"the data set's tokenizer {vocabulary}: prepare the data with the model's tokenizer"
        )
    return backbone


def _from_fields(fields: dict[str, Any], vocabulary: int) -> PretrainedConfig:
    """Transformers keeps a field that it does not know without a word, and builds another model than was meant."""
    fields = dict(fields)
    default = AutoConfig.for_model(fields.pop("model_type"))
    for name in fields.keys() & _TOKENIZER_FIELDS:
        raise ValueError(f"{name} comes from the tokenizer: leave it out")
    for name in fields.keys() - _COMMON_FIELDS:
        if not hasattr(default, name):
            raise ValueError(f"{default.model_type} has no field {name}{did_you_mean(name, default.to_dict())}")
    tokens = dict.fromkeys(_TOKENIZER_FIELDS) | {"vocab_size": vocabulary}
    return AutoConfig.for_model(default.model_type, **fields, **tokens)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def add_lora(backbone: nn.Module, spec: LoraSpec) -> None:
    """Put adapters in place on the layers that `spec.targets` names; the backbone keeps its class.

    Raises:
        InputError: a target names no layer, or one that cannot be adapted.
    """
    found = linear_layers(backbone)
    targets = found if spec.targets is None else list(spec.targets)
    # PEFT is content when one of several names exists, and would leave the layers of the others as they are.
    if wrong := [target for target in targets if not _is_adaptable(backbone, target)]:
        raise InputError(f"model.lora.targets {wrong}: the linear layers of {type(backbone).__name__} are {', '.join(found)}")
    try:
        inject_adapter_in_model(lora_config(spec, targets), backbone)
    except ValueError as error:
        raise InputError(f"model.lora.targets {targets}: {first_line(error)}") from None
    for name, parameter in backbone.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    for module in backbone.modules():
        if isinstance(module, LoraLayer):
            # PEFT would widen bfloat16 inputs to fp32, only for autocast to narrow them again to what they were.
            module.cast_input_dtype_enabled = False


def lora_config(spec: LoraSpec, targets: list[str]) -> LoraConfig:
    """PEFT's configuration of adapters on the layers `targets`."""
    return LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=targets)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _is_adaptable(backbone: nn.Module, target: str) -> bool:
    """Whether modules have this name, and all of them are such as PEFT adapts; `mlp` is a group of them."""
    named = [module for name, module in backbone.named_modules() if f".{name}".endswith(f".{target}")]
    return bool(named) and all(isinstance(module, nn.Linear | nn.Embedding) for module in named)


def linear_layers(backbone: nn.Module) -> list[str]:
    """Names of the linear layers of a decoder layer, `q_proj` and so on, in their order; Phi-3 has `qkv_proj` instead."""
    modules = (pair for layer in decoder_layers(backbone) for pair in layer.named_modules())
    return list(dict.fromkeys(name.split(".")[-1] for name, module in modules if isinstance(module, nn.Linear)))
