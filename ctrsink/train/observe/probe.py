"""A look inside the model between two steps: gamma of every layer, and how much of the targets' attention goes to sinks."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from ctrsink.attention.shares import watched
from ctrsink.config.stages import ReadoutSpec
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.reader import Dataset
from ctrsink.families.decoder.model import CTRModel
from ctrsink.sequences.batch import Batch
from ctrsink.stream.stream import SequenceSource, evaluation_batches

SEQUENCES = 8


def probe_batch(dataset: Dataset, split: str, layout: Layout) -> Batch:
    """A few sequences of the split, the same at any time and on every rank.

    Raises:
        InputError: the split has none.
    """
    source = SequenceSource(dataset, split, layout, newest=True)
    # A piece of per_request may be as many sequences as it has impressions.
    size = max(1, SEQUENCES // layout.targets) if layout.examples == "per_request" else SEQUENCES
    (batch,) = evaluation_batches(source, size, 0, 1, size)
    return batch


def probe(forward: Callable[[Batch, ReadoutSpec], Any], model: CTRModel, batch: Batch, readout: ReadoutSpec) -> dict[str, float]:
    """`gamma/layerNN` and `sink_attention/layerNN` of every layer that has one, by one forward pass without gradients or dropout.

    Under ZeRO-3 every rank must call it with the same batch; gamma is read while its module has its weights.

    Args:
        forward: runs `model`, as a DeepSpeed engine does.
        batch: on the model's device.
    """
    out: dict[str, float] = {}

    def keep(key: str) -> Callable[..., None]:
        return lambda module, args: out.__setitem__(key, float(module.gamma))

    hooks = [bias.register_forward_pre_hook(keep(f"gamma/layer{i:02}")) for i, bias in enumerate(model.biases)]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), watched(model, batch, readout) if model.sinks is not None else nullcontext() as share:
            forward(batch, readout)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return out | {f"sink_attention/layer{i:02}": value for i, value in (share.layers if share else {}).items()}
