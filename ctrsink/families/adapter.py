"""An exported adapter: what was trained, beside a base that is read from where it lies and must be the one it was trained on."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file

from ctrsink.config.model import ModelSpec
from ctrsink.errors import InputError, first_line
from ctrsink.families.facts import Facts
from ctrsink.families.parameters import DTYPES
from ctrsink.families.protocol import CTRModule
from ctrsink.families.registry import family_of

WEIGHTS = "adapter_model.safetensors"
"""PEFT's name for the adapter's weights."""
CONFIG = "adapter_config.json"
"""PEFT's name for what it is."""
OWN = "ctrsink.safetensors"
"""What the model has beside backbone and adapter."""


@dataclass(frozen=True)
class Base:
    """What an adapter's configuration says of its base, beside where it is."""

    precision: Literal["fp32", "bf16"]
    """In which its weights were frozen."""
    fingerprint: str


def based(config: Any, facts: Facts) -> CTRModule:
    """The model of an adapter's configuration, with its base's weights, before it has its own; in fp32.

    Raises:
        InputError: the base cannot be read.
    """
    return family_of(config.family).build(section_of(config), facts, 0, config.base["precision"]).float()


def section_of(config: Any) -> Any:
    """The section `model` of an exported configuration."""
    return TypeAdapter(ModelSpec).validate_python(config.model)


def put(module: CTRModule, config: Any, folder: str | Path) -> None:
    """Put the weights of the adapter in `folder` into a module that `based` made.

    Raises:
        InputError: the base is another, or the folder's weights are not those of its configuration.
    """
    found = family_of(config.family).adapter(module, section_of(config))
    if fingerprint(found.base, config.base["precision"]) != config.base["fingerprint"]:
        raise InputError(
            f"{found.origin} has other weights than the base that the adapter {folder} was trained on: name that one with --base"
        )
    for name, places in ((WEIGHTS, found.weights), (OWN, found.own)):
        try:
            given = load_file(Path(folder) / name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder}/{name} is missing or damaged ({first_line(error)}): export the model again") from None
        if {key: value.shape for key, value in given.items()} != {key: value.shape for key, value in places.items()}:
            raise InputError(f"{folder}/{name} does not fit its configuration: export the model again")
        for key, value in given.items():
            places[key].data.copy_(value)


def fingerprint(weights: Mapping[str, torch.Tensor], precision: str) -> str:
    """sha256 over names, shapes and values, in the precision in which the weights were frozen: equal exactly where all are.

    One tensor at a time is copied.
    """
    found = hashlib.sha256(precision.encode())
    for name in sorted(weights):
        value = weights[name].detach().to(DTYPES[precision]).contiguous()
        found.update(f"\n{name} {tuple(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
