"""From a ModelSpec to a CTRModel: backbone from a hub id, a folder or a configuration; LoRA; everything from one seed."""

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from ctrsink.config.model import LoraSpec, ModelSpec
from ctrsink.errors import InputError
from ctrsink.model import attention
from ctrsink.model.ctr import CTRModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_model(spec: ModelSpec, vocabulary: int, seed: int, precision: str = "fp32") -> CTRModel:
    """A CTRModel whose every random weight comes from `seed`, so that all ranks and all restarts build the same one.

    Args:
        vocabulary: size of the tokenizer; used by a backbone from `config`, checked against a pretrained one.
        precision: of the backbone's weights; sink, bias, head and LoRA are fp32.

    Raises:
        InputError: the backbone cannot be loaded or is of a kind that cannot carry sinks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = _backbone(spec, vocabulary, DTYPES[precision])
        _check_attention(backbone.config)
        if spec.lora is not None:
            add_lora(backbone, spec.lora)
        model = CTRModel(backbone, spec)
    if spec.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def empty_model(spec: ModelSpec, config: dict[str, Any]) -> CTRModel:
    """A CTRModel without LoRA on a backbone of transformers configuration `config`, for weights that are loaded next."""
    fields = dict(config)
    backbone = AutoModel.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields), attn_implementation=attention.BACKEND)
    return CTRModel(backbone, spec)


def _backbone(spec: ModelSpec, vocabulary: int, dtype: torch.dtype) -> Any:
    source = spec.backbone
    if source.config is not None:
        fields = dict(source.config)
        kind = fields.pop("model_type")
        try:
            config = AutoConfig.for_model(kind, **fields, vocab_size=vocabulary, pad_token_id=None, bos_token_id=None, eos_token_id=None)
        except ValueError as error:
            raise InputError(f"model.backbone.config: {str(error).splitlines()[0]}") from None
        return AutoModel.from_config(config, attn_implementation=attention.BACKEND, dtype=dtype)
    try:
        backbone = AutoModel.from_pretrained(
            source.path,
            revision=source.revision or "main",
            attn_implementation=attention.BACKEND,
            dtype=dtype,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"model.backbone.path {source.path}: {str(error).strip().splitlines()[0]}") from None
    if vocabulary > backbone.get_input_embeddings().weight.shape[0]:
        raise InputError(
            f"model.backbone.path {source.path} has {backbone.get_input_embeddings().weight.shape[0]} token embeddings, "
            f"the data set's tokenizer {vocabulary}: prepare the data with the model's tokenizer"
        )
    return backbone


def _check_attention(config: PretrainedConfig) -> None:
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True):
        kinds.add("sliding_attention")
    if kinds - {"full_attention"}:
        raise InputError(
            f"model.backbone: {text.model_type} uses {', '.join(sorted(kinds - {'full_attention'}))}; "
            "only decoders with full attention in every layer can carry sinks yet"
        )


def add_lora(backbone: nn.Module, spec: LoraSpec) -> None:
    """Put adapters in place on the layers that `spec.targets` names; the backbone keeps its class."""
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=list(spec.targets))  # pyright: ignore[reportArgumentType, reportCallIssue]
    try:
        inject_adapter_in_model(config, backbone)
    except ValueError as error:
        raise InputError(f"model.lora.targets {list(spec.targets)}: {str(error).splitlines()[0]}") from None
    for name, parameter in backbone.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
