"""An objective that is not about clicks, measured on a sample of a split: shares of what was predicted right."""

from collections.abc import Callable

import torch

from ctrsink.dist import Topology, all_sum
from ctrsink.families.protocol import Out
from ctrsink.sequences.batch import Batch
from ctrsink.stream.evaluation import Share


def measured(forward: Callable[[Batch], Out], sample: Share, topology: Topology) -> dict[str, float]:
    """`accuracy` over all that was to be predicted, and `accuracy/<field>`; the same on every rank. A share of nothing is nan.

    Args:
        forward: the model; called equally often on every rank.
        sample: this rank's share.
    """
    sums: dict[str, torch.Tensor] = {}
    for batch in sample.batches:
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
