"""LoRA becomes part of the weights it adapts: computed in fp32, a layer at a time, so that serving needs no adapters."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ctrsink.errors import RunError
from ctrsink.families.parameters import stored


def merged_weights(model: nn.Module) -> tuple[dict[str, Callable[[], torch.Tensor]], int]:
    """What is stored of `model` once LoRA is merged, by the names of the plain layers; and how many are adapted.

    An adapted layer's weight is merged when it is asked for; `model` stays as it is.

    Raises:
        RunError: on asking, an adapter holds values that are not finite, or is not over a weight in fp32.
    """
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    found = {name.replace(".base_layer.", "."): value for name, value in stored(model).items() if ".lora_" not in name}
    found |= {f"{name}.weight": partial(_merged, name, layer) for name, layer in adapted.items()}
    return found, len(adapted)


@torch.no_grad()
def _merged(name: str, layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.get_base_layer().weight
    if weight.dtype != torch.float32:
        raise RunError(f"{name} is {weight.dtype}: LoRA is merged in fp32 only")
    whole = weight.clone()
    for adapter in layer.active_adapters:
        whole += layer.get_delta_weight(adapter)
    if not whole.isfinite().all():
        raise RunError(f"cannot merge LoRA into {name}: what the adapter adds is not finite")
    return whole
