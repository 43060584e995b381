"""LoRA becomes part of the weights it adapts: computed once, in fp32, so that serving needs no adapters."""

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ctrsink.errors import RunError, first_line


def merge_lora(model: nn.Module) -> int:
    """Replace every adapted layer of `model` by a plain one that computes the same; returns how many there were.

    Raises:
        RunError: an adapter holds values that are not finite.
    """
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, layer in adapted:
        assert isinstance(layer, nn.Module)
        plain = layer.get_base_layer()
        if plain.weight.dtype != torch.float32:
            raise RunError(f"{name} is {plain.weight.dtype}: LoRA is merged in fp32 only")
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise RunError(f"cannot merge LoRA into {name}: {first_line(error)}") from None
        model.set_submodule(name, plain)
    return len(adapted)
