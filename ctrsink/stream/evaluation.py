"""What an evaluation reads: every sequence of a split, or a fixed sample of them, dealt out to the ranks in batches."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ctrsink.features.mix64 import mix64
from ctrsink.sequences.batch import Batch
from ctrsink.stream.ahead import read_ahead
from ctrsink.stream.order import shuffled
from ctrsink.stream.stream import SequenceSource

WINDOW = 64  # rounds of batches whose sequences are sorted by length


@dataclass(frozen=True)
class Share:
    """One rank's batches of an evaluation, as many as every other rank has: round after round, one for each rank."""

    batches: Iterable[Batch]
    finished: np.ndarray
    """Of each round the first user who may still come after it, int64 [rounds]: all before that one have been seen whole."""

    def held(self) -> "Share":
        """The same with its batches in memory, to be gone through many times; about 30 bytes a token."""
        return Share(list(self.batches), self.finished)


def evaluation_batches(source: SequenceSource, batch_size: int, rank: int, world: int, sample: int | None) -> Iterator[Batch]:
    """Every sequence of the split once over all ranks (or a fixed random `sample`), equally many batches on each rank."""
    return iter(share_of(source, drawn(source, sample), batch_size, rank, world).batches)


def drawn(source: SequenceSource, count: int | None, shards: int | None = None) -> np.ndarray:
    """Ascending ids of `count` sequences, drawn at random and always the same, int64 [N]; None: all there are.

    A smaller sample of the same shards is part of a larger one. One shard's ids are looked at at a time.

    Args:
        shards: of so many shards, drawn too, and of more where these hold fewer sequences; None: of all.
    """
    total = sum(source.per_shard)
    if count is None or count >= total:
        return np.arange(total)
    sizes = np.array(source.per_shard)
    numbers = np.flatnonzero(sizes)
    if shards is not None:
        numbers = shuffled(numbers, 0, 0)
        numbers = numbers[: max(shards, int(np.searchsorted(np.cumsum(sizes[numbers]), count)) + 1)]
    ends = np.cumsum(sizes)
    found = np.empty(0, np.int64)
    for number in numbers.tolist():
        found = np.concatenate([found, np.arange(ends[number] - sizes[number], ends[number])])
        if len(found) > count:
            found = found[np.argpartition(mix64(found, 0, 0), count - 1)[:count]]
    return np.sort(found)


def share_of(source: SequenceSource, ids: np.ndarray, batch_size: int, rank: int, world: int) -> Share:
    """The share of `rank` in the sequences `ids`, ascending; sequences of like length meet in a batch."""
    ids = ids[np.lexsort((-source.lengths(ids), _windows(source, ids, WINDOW * batch_size * world)))]
    rounds = -(-len(ids) // (batch_size * world))
    # Filled up with the last, whose shard is open.
    padded = np.pad(ids, (0, rounds * batch_size * world - len(ids)), "edge").reshape(rounds, batch_size, world)
    counted = (np.arange(padded.size) < len(ids)).reshape(padded.shape)[:, :, rank]
    users, _ = source.owners(padded.min(axis=(1, 2)))
    later = np.minimum.accumulate(users[::-1])[::-1]
    own = padded[:, :, rank]
    batches = read_ahead(lambda i: source.build(own[i], counted[i]), rounds)
    return Share(batches, np.append(later[1:], np.iinfo(np.int64).max))


def _windows(source: SequenceSource, ids: np.ndarray, size: int) -> np.ndarray:
    """The window of each of the ascending ids, within which like lengths may meet, int64 [N].

    It has `size` sequences at most, and half of the shards that are held: a batch may reach into the next window.
    """
    shards = np.searchsorted(np.cumsum(source.per_shard), ids, side="right")
    opened = np.cumsum(np.diff(shards, prepend=shards[:1]) > 0)
    return opened // max(1, source.dataset.keep_shards // 2) + np.arange(len(ids)) // size
