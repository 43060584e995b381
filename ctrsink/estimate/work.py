"""What the sequences of a run cost, by those of a few shards."""

from dataclasses import dataclass

import numpy as np

from ctrsink.sequences.batch import Batch
from ctrsink.stream.stream import SequenceSource

SHARDS, OF_EACH = 4, 64  # enough for a mean, and soon read however large the data set is


@dataclass(frozen=True)
class Sample:
    """Sequences of the train split, from shards that lie evenly over it."""

    batch: Batch
    pieces: int
    """Numbers of the order that they are: one of `per_request` may be several sequences."""
    shards: tuple[int, ...]
    """That they are of."""

    @classmethod
    def of(cls, source: SequenceSource) -> "Sample":
        """Read at most SHARDS shards of what the source has, and take at most OF_EACH pieces of each."""
        per_shard = np.array(source.per_shard)
        some = np.flatnonzero(per_shard)
        some = some[np.unique(np.linspace(0, len(some) - 1, min(SHARDS, len(some))).round().astype(int))]
        ends = per_shard.cumsum()
        spread = [np.linspace(ends[n] - per_shard[n], ends[n] - 1, min(OF_EACH, per_shard[n])).astype(np.int64) for n in some]
        ids = np.unique(np.concatenate(spread))
        return cls(source.build(ids), len(ids), tuple(some.tolist()))

    @property
    def tokens(self) -> float:
        """Of a piece, in the mean; of families without text, behaviours and targets."""
        return self.batch.tokens / self.pieces
