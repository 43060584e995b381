"""Which of the seven groups a parameter belongs to; a stage names groups, never parameters."""

import re

_PREFIXES: dict[str, str] = {
    "sinks": "sink",
    "biases": "bias",
    "temporal": "bias",
    "similarity": "bias",
    "summaries": "bias",
    "target": "head",
    "head": "head",
}


def group_of(name: str) -> str:
    """The group of the CTRModel parameter `name`."""
    part = name.split(".")[0]
    if part in ("sinks", "target") and ".ids." in name:
        return "ids"
    if part in _PREFIXES:
        return _PREFIXES[part]
    if ".lora_" in name:
        return "lora"
    return "norm" if re.search(r"norm\w*\.(weight|bias)$", name) else "backbone"


def trained_as(name: str, trainable: tuple[str, ...]) -> str | None:
    """The group as which a stage trains the parameter, None where it is frozen. `backbone` takes the norms along."""
    group = group_of(name)
    if group == "norm" and "norm" not in trainable:
        group = "backbone"
    return group if group in trainable else None
