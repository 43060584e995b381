"""Which of the seven groups a parameter belongs to; a stage names groups, never parameters."""

import re

from torch import nn

from ctrsink.config.stages import Group

_PREFIXES: dict[str, Group] = {
    "sinks": "sink",
    "biases": "bias",
    "temporal": "bias",
    "similarity": "bias",
    "target": "head",
    "head": "head",
}


def group_of(name: str) -> Group:
    """The group of the CTRModel parameter `name`."""
    part = name.split(".")[0]
    if part in ("sinks", "target") and ".ids." in name:
        return "ids"
    if part in _PREFIXES:
        return _PREFIXES[part]
    if ".lora_" in name:
        return "lora"
    return "norm" if re.search(r"norm\w*\.(weight|bias)$", name) else "backbone"


def trained_as(name: str, trainable: tuple[Group, ...]) -> Group | None:
    """The group as which a stage trains the parameter, None where it is frozen. `backbone` takes the norms along."""
    group = group_of(name)
    if group == "norm" and "norm" not in trainable:
        group = "backbone"
    return group if group in trainable else None


def set_trainable(model: nn.Module, trainable: tuple[Group, ...]) -> None:
    """Freeze everything else; what is trained is held in fp32 whatever the precision of the rest."""
    for name, parameter in model.named_parameters():
        trained = trained_as(name, trainable) is not None
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()
