"""Parameters of a model of any family: values put in, groups frozen."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ctrsink.errors import InputError
from ctrsink.families.protocol import CTRModule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_parameters(
    model: nn.Module,
    parameters: Mapping[str, torch.Tensor],
    copied: bool = True,
    dtype_of: Callable[[str], torch.dtype] | None = None,
) -> None:
    """Put checkpointed values into `model`.

    Args:
        copied: each into memory of its own; else they are the model's from then on.
        dtype_of: what a parameter is held in, by its name; by default what the checkpoint has, fp32.

    Raises:
        InputError: a name does not exist there, or has another shape.
    """
    named = dict(model.named_parameters())
    for name, value in parameters.items():
        if name not in named or named[name].shape != value.shape:
            found = tuple(named[name].shape) if name in named else "absent"
            raise InputError(f"the checkpoint does not fit the model: {name} is {tuple(value.shape)} there and {found} here")
        named[name].data = value.to(value.dtype if dtype_of is None else dtype_of(name), copy=copied)


def stored(module: nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    """What is stored of a module, by name; nothing is copied."""
    return {name: value.detach for name, value in module.state_dict().items()}


def trained_in(model: CTRModule, trainable: tuple[str, ...], weights: str) -> torch.dtype:
    """What a stage holds all of its trained weights in: bfloat16 where it trains a large group of a model that multiplies in it.

    Args:
        weights: `train.weights`.
    """
    large = not set(trainable).isdisjoint(model.large)
    return DTYPES[weights if large and model.mixed_precision else "fp32"]


def set_trainable(model: CTRModule, trainable: tuple[str, ...], weights: str = "fp32") -> None:
    """Freeze everything else; what is trained is held as `trained_in` says, whatever the precision of the rest."""
    dtype = trained_in(model, trainable, weights)
    for name, parameter in model.named_parameters():
        trained = model.trained_as(name, trainable) is not None
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.to(dtype)
