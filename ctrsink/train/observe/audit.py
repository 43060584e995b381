"""Which impressions a run has trained on, as a count and a checksum that depends on the multiset alone.

Ranks, micro-batches and restarts may deal the impressions out in any way: sums of the same numbers are the same. So that nothing
was lost or repeated can be checked against the data set when a run has ended.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ctrsink.dist import Topology, all_sum
from ctrsink.features.mix64 import mix64
from ctrsink.sequences.batch import Batch
from ctrsink.stream.order import Order
from ctrsink.stream.stream import SequenceSource

AT_ONCE = 512  # sequences


@dataclass(frozen=True)
class Audit:
    """A multiset of impressions."""

    impressions: int = 0
    checksum: int = 0
    """Sum of a hash of each (user, event), modulo 2^64."""
    skipped: int = 0
    """Impressions that the run read and did not learn from: their step was not finite (`train.on_nonfinite: skip`)."""
    flops: float = 0.0
    """Floating point operations that the models need for all of it, see CTRModule.flop_count."""

    def __add__(self, other: "Audit") -> "Audit":
        return Audit(
            self.impressions + other.impressions,
            (self.checksum + other.checksum) % 2**64,
            self.skipped + other.skipped,
            self.flops + other.flops,
        )

    @classmethod
    def of(cls, batches: list[Batch]) -> "Audit":
        """The impressions of these batches."""
        out = cls()
        for batch in batches:
            of = batch.targets
            user, event = (rows[of.counted].numpy().astype(np.uint64) for rows in (of.users, of.events))
            with np.errstate(over="ignore"):
                checksum = int(mix64(user << np.uint64(32) | event, 0).sum(dtype=np.uint64))
            out += cls(batch.impressions, checksum)
        return out

    def over_ranks(self, topology: Topology) -> "Audit":
        """The sum of all ranks', on every rank."""
        if topology.world == 1:
            return self
        # As int64 sums wrap around, which is what modulo 2^64 means.
        words = np.array([self.impressions, self.checksum, self.skipped], np.uint64).astype(np.int64)
        tensor = torch.from_numpy(words).to(topology.device)
        dist.all_reduce(tensor)
        return Audit(*tensor.cpu().numpy().astype(np.uint64).tolist(), *all_sum([self.flops], topology))


def expected(source: SequenceSource, order: Order, start: int, end: int) -> Audit:
    """What a run must have trained on between two positions of its stream: [start, end)."""
    out = Audit()
    for first in range(start, end, AT_ONCE):
        out += Audit.of([source.build(order.ids(first, min(AT_ONCE, end - first)))])
    return out
