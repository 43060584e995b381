"""The canonical order: an epoch is a one-dimensional sequence that depends on (seed, epoch) alone; ranks take stripes of it.

Pure functions and no state: a position, one integer, says how far a run has come, at any number of workers.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def mix64(values: np.ndarray, *keys: int) -> np.ndarray:
    """A 64-bit hash of integers under integer keys, equal on every machine and in every version of numpy (splitmix64)."""
    out = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        for key in (0, *keys):
            out = out + np.uint64(key % 2**64) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
            out = (out ^ (out >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            out = (out ^ (out >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            out = out ^ (out >> np.uint64(31))
    return out


def shuffled(values: np.ndarray, *keys: int) -> np.ndarray:
    """The distinct integers `values`, [N], in an order that depends on them and the keys only."""
    return values[np.argsort(mix64(values, *keys), kind="stable")]


@dataclass(frozen=True)
class Order:
    """The endless stream of sequence ids: epoch after epoch, each a permutation of `0 .. total - 1`.

    Ids are numbered shard by shard. Shards are shuffled, and the sequences within each block of `shuffle_shards` of them, so a
    reader holds one block at a time; a sequence is mixed with those of its block's shards, not of all.

    Args:
        per_shard: number of sequences of each shard.
        seed: None keeps the natural order (evaluation).
        shuffle_shards: shards per block.
    """

    per_shard: tuple[int, ...]
    seed: int | None
    shuffle_shards: int = 8

    @property
    def total(self) -> int:
        return sum(self.per_shard)

    def ids(self, start: int, count: int) -> np.ndarray:
        """Sequence ids at positions `start .. start + count - 1` of the stream, int64 [count]."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.total)
            blocks, ends = _blocks(self, epoch)
            block = int(np.searchsorted(ends, offset, side="right"))
            first = int(ends[block - 1]) if block else 0
            part = _block_ids(self, epoch, blocks[block])[offset - first :][:count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


@lru_cache(maxsize=4)
def _blocks(order: Order, epoch: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The shards of each block of an epoch and the position in the epoch where each block ends."""
    shards = np.arange(len(order.per_shard))
    if order.seed is not None:
        shards = shuffled(shards, order.seed, epoch)
    size = order.shuffle_shards
    blocks = [tuple(int(s) for s in shards[i : i + size]) for i in range(0, len(shards), size)]
    return blocks, np.cumsum([sum(order.per_shard[s] for s in block) for block in blocks])


@lru_cache(maxsize=2)
def _block_ids(order: Order, epoch: int, shards: tuple[int, ...]) -> np.ndarray:
    starts = np.concatenate([[0], np.cumsum(order.per_shard)])
    ids = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])
    return ids if order.seed is None else shuffled(ids, order.seed, epoch)


def deal(lengths: np.ndarray, world: int, accumulation: int) -> np.ndarray:
    """Share a global batch out: indices int64 [world, accumulation, micro] into `lengths`, each index once.

    Sequences of like length meet in the same micro-step on all ranks, so that little is padded and no rank waits for another.

    Raises:
        ValueError: the batch is not world x accumulation x a whole number.
    """
    if len(lengths) % (world * accumulation):
        raise ValueError(f"{len(lengths)} sequences cannot be dealt to {world} ranks x {accumulation} micro-batches")
    by_length = np.argsort(-lengths, kind="stable")
    return by_length.reshape(accumulation, -1, world).transpose(2, 0, 1)
