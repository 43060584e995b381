"""What a decoder's attention may not do: whatever plain causal attention would leave out is refused, never dropped in silence."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ctrsink.attention.inputs import AttentionInputs
from ctrsink.errors import InputError

_DEPEND_ON_LENGTH = ("longrope", "dynamic")
"""Rotary frequencies that depend on the longest sequence of a batch."""


def check_config(config: PretrainedConfig, own_fields: bool) -> None:
    """Refuse attention other than plain causal attention over everything earlier, before any weight is read.

    Args:
        own_fields: the run itself wrote the configuration, so that it can switch a window off. The window of a pretrained model
            stays, and `guard_length` sees to it that no sequence is long enough to feel it.

    Raises:
        InputError: the architecture has layers with another kind of attention, caps its logits, or has a needless window.
    """
    text = config.get_text_config()
    reasons: list[str] = []
    other = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if other:
        reasons.append(f"{', '.join(sorted(other))} in some layers")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        reasons.append(f"soft-capped attention logits (attn_logit_softcapping {text.attn_logit_softcapping})")
    if reasons:
        raise InputError(
            f"model.backbone: {text.model_type} uses {' and '.join(reasons)}; "
            "only decoders with full attention in every layer can carry sinks: take one such as llama, qwen3, gemma or olmo2"
        )
    if own_fields and (window := _window(text)) is not None:
        raise InputError(
            f"model.backbone: {text.model_type} uses sliding_attention over {window} positions, and sinks need full attention: "
            "set model.backbone.config.sliding_window: null"
        )


def check_layers(layers: list[nn.Module]) -> None:
    """Refuse attention with learned sinks of its own (gpt-oss): they are lost in transformers' sdpa function.

    Raises:
        InputError: a layer has them.
    """
    for layer in layers:
        if isinstance(getattr(layer.self_attn, "sinks", None), torch.Tensor):
            raise InputError(
                f"model.backbone: {type(layer).__name__} has attention sinks of its own, which sdpa does not compute; "
                "take a decoder such as llama, qwen3 or gemma"
            )


def check_backend(config: PretrainedConfig, attention: str) -> None:
    """Refuse what this backend does not compute.

    Raises:
        InputError: of `flex` and `blocks`: the backbone drops attention weights; of `flex`: its heads are too narrow.
    """
    text = config.get_text_config()
    if attention != "sdpa" and getattr(text, "attention_dropout", 0.0):
        raise InputError(
            f"model.attention: {attention} has no dropout of attention weights, and the backbone's attention_dropout is "
            f"{text.attention_dropout}: set model.backbone.config.attention_dropout to 0, or use sdpa"
        )
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if attention == "flex" and width < 16:
        raise InputError(f"model.attention: flex needs heads of at least 16 dimensions, the backbone's have {width}; use sdpa")


def guard_length(backbone: nn.Module) -> None:
    """Let `backbone` raise InputError for sequences so long that its attention or positions would change, see length_limit."""
    config: Any = backbone.config
    if (found := length_limit(config)) is not None:
        backbone.register_forward_pre_hook(partial(_check_length, *found), with_kwargs=True)
        rotary = [module for module in backbone.modules() if getattr(module, "rope_type", None) in _DEPEND_ON_LENGTH]
        backbone.register_forward_pre_hook(partial(_hold_frequencies, rotary))


def length_limit(config: PretrainedConfig) -> tuple[int, str] | None:
    """The longest sequence that is computed exactly, and the reason; None where there is no such limit.

    A window of W positions is plain causal attention for sequences of up to W, so a pretrained model with a window (Mistral 7B
    v0.1, Phi-3 mini) is computed exactly. Rotary frequencies that depend on the longest sequence of a batch (`longrope`,
    `dynamic`) are constant up to the original length; beyond it a neighbour in the batch would change a result.
    """
    text: Any = config.get_text_config()
    limits: list[tuple[int, str]] = []
    if (window := _window(text)) is not None:
        limits.append((window, f"sliding window of {window} positions"))
    rope = getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or text.max_position_embeddings
        limits.append((original, f"rope_type longrope, whose frequencies change after {original} positions"))
    if kind == "dynamic":
        original = text.max_position_embeddings
        limits.append((original, f"rope_type dynamic, whose frequencies change after {original} positions"))
    if not limits:
        return None
    limit, reason = min(limits)
    return limit, f"{text.model_type} has a {reason}"


def _hold_frequencies(rotary: list[Any], *_: Any) -> None:
    """Up to the limit they stay what they are; else the host would ask the device for the longest position in every pass.

    Not before the first one: a model that is loaded computes them anew, by this very type.
    """
    for module in rotary:
        module.rope_type = "default"


def _check_length(limit: int, reason: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Sequences of a pack have positions of their own, counted by the loader: on a GPU the host would wait for them."""
    given: AttentionInputs | None = kwargs.get("attention_inputs")
    length = kwargs["inputs_embeds"].shape[1] if given is None else given.packed.most["span"]
    if length > limit:
        raise InputError(too_long(reason, length))


def too_long(reason: str, length: int) -> str:
    """What to say of a sequence that is longer than the limit, which has that `reason`."""
    return f"model.backbone: {reason}, a sequence of the data {length}: lower data.history or take another model"


def _window(text: Any) -> int | None:
    """Positions that a layer attends to, where the architecture has one window for all layers; None: all."""
    return getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
