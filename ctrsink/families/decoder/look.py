"""A look inside a decoder between two steps: gamma of every layer, and how much of the targets' attention goes to sinks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ctrsink.config.stages import Objective
from ctrsink.families.decoder.shares import watched
from ctrsink.sequences.batch import Batch

if TYPE_CHECKING:
    from ctrsink.families.decoder.model import CTRModel

Shares = dict[str, list[float]]
"""Share of a target's attention to its history that goes to sinks, by head, by layer."""


def gammas_and_shares(
    model: "CTRModel", batch: Batch, objective: Objective, forward: Callable[[Batch, Objective], Any]
) -> dict[str, float]:
    """`gamma/layerNN` and `sink_attention/layerNN` of every layer that has one; see CTRModule.look.

    Under ZeRO-3 gamma is read while its module has its weights.
    """
    out: dict[str, float] = {}

    def keep(key: str) -> Callable[..., None]:
        return lambda module, args: out.__setitem__(key, float(module.gamma))

    hooks = [bias.register_forward_pre_hook(keep(f"gamma/layer{i:02}")) for i, bias in enumerate(model.biases)]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), watched(model, batch, objective) if model.sinks is not None else nullcontext() as share:
            forward(batch, objective)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return out | {f"sink_attention/layer{i:02}": value for i, value in (share.layers if share else {}).items()}


def looked(
    model: "CTRModel", untrained: Callable[[], "CTRModel"], batches: list[Batch], objective: Objective
) -> dict[str, dict[str, Shares]]:
    """`attention_to_sinks`: by layer and head, of the model `untrained`, `trained`, and trained `without_bias` (similarity,
    temporal, inter-sink bias and that of means set to 0); nothing without sinks.
    """
    if model.sinks is None:
        return {}
    with _without_biases(model) as silenced:
        without = shares_of(silenced, batches, objective)
    trained = shares_of(model, batches, objective)
    found = {"untrained": shares_of(untrained(), batches, objective), "trained": trained, "without_bias": without}
    return {"attention_to_sinks": found}


def shares_of(model: "CTRModel", batches: list[Batch], objective: Objective) -> Shares:
    """By layer, of each head, the mean over the batches in which targets see a history."""
    found: dict[int, list[list[float]]] = {}
    for batch in batches:
        with torch.inference_mode(), watched(model, batch, objective) as share:
            model(batch, objective)
        for layer, heads in share.heads.items():
            found.setdefault(layer, []).append(heads)
    return {f"layer{layer:02}": np.mean(heads, axis=0).round(4).tolist() for layer, heads in sorted(found.items())}


@contextmanager
def _without_biases(model: "CTRModel") -> Iterator["CTRModel"]:
    """The model, whose biases are 0 meanwhile."""
    names = ("similarity", "temporal", "summaries", "biases")
    kept = {name: value.detach().clone() for name, value in model.named_parameters() if name.split(".")[0] in names}
    with torch.no_grad():
        for name in kept:
            model.get_parameter(name).zero_()
    try:
        yield model
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                model.get_parameter(name).copy_(value)
