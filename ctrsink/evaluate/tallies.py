"""An objective that is not about clicks, measured on a sample of a split: shares of what was predicted right."""

from collections.abc import Callable

import torch

from ctrsink.config.train import EvaluateSpec
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.reader import Dataset
from ctrsink.dist import Topology, all_sum
from ctrsink.families.protocol import Out
from ctrsink.families.registry import source_of
from ctrsink.sequences.batch import Batch
from ctrsink.stream.stream import evaluation_batches


def measured(
    forward: Callable[[Batch], Out], dataset: Dataset, split: str, layout: Layout, spec: EvaluateSpec, topology: Topology
) -> dict[str, float]:
    """`accuracy` over all that was to be predicted, and `accuracy/<field>`; the same on every rank. A share of nothing is nan.

    Args:
        forward: the model; called equally often on every rank.
    """
    source = source_of(dataset, split, layout, newest=True)
    sums: dict[str, torch.Tensor] = {}
    for batch in evaluation_batches(source, source.at_once(spec.batch_size), topology.rank, topology.world, spec.max_sequences):
        with torch.no_grad():
            tallies = forward(batch).tallies or {}
        for name, value in tallies.items():
            sums[name] = sums.get(name, 0) + value.double()
    found = dict(zip(sums, all_sum(torch.stack(list(sums.values())), topology), strict=True))
    hits = {name.removeprefix("hits/"): value for name, value in found.items() if name.startswith("hits/")}
    of = {name: found[f"of/{name}"] for name in hits}
    shares = {f"accuracy/{name}": _share(hits[name], of[name]) for name in hits}
    return {"accuracy": _share(sum(hits.values()), sum(of.values())), **shares}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
