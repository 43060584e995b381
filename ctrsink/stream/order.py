"""The canonical order: a one-dimensional sequence that depends on a seed alone, of which ranks take stripes.

Pure functions and no state: a position, one integer, says how far a run has come, at any number of workers.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heappush

import numpy as np

from ctrsink.features.mix64 import mix64


def shuffled(values: np.ndarray, *keys: int) -> np.ndarray:
    """The distinct integers `values`, [N], in an order that depends on them and the keys only."""
    return values[np.argsort(mix64(values, *keys), kind="stable")]


@dataclass(frozen=True, eq=False)
class Order:
    """The stream of sequence ids: round after round, each a permutation of its own ids.

    Ids are numbered shard by shard. Shards are shuffled, and the sequences within each block of `shuffle_shards` of them, so a
    reader holds one block at a time; a sequence is mixed with those of its block's shards, not of all.

    Without `parts` a round is an epoch over all shards, shuffled by (seed, epoch), and the stream is endless. With them a round
    is a part, shuffled by (seed, part), and the stream ends with the last: a part that is appended changes nothing before it.

    Args:
        per_shard: number of sequences of each shard.
        seed: None keeps the natural order (evaluation).
        shuffle_shards: shards per block.
        parts: number of shards of each part, oldest first.
    """

    per_shard: tuple[int, ...]
    seed: int | None
    shuffle_shards: int = 8
    parts: tuple[int, ...] = ()

    @cached_property
    def total(self) -> int:
        """Ids of an epoch, or of all parts."""
        return sum(self.per_shard)

    def ids(self, start: int, count: int) -> np.ndarray:
        """Sequence ids at positions `start .. start + count - 1` of the stream, int64 [count].

        Raises:
            ValueError: the stream ends before.
        """
        found = []
        while count > 0:
            block, first = _locate(self, start)
            part = _block_ids(self, *block)[start - first :][:count]
            found.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def shards_after(self, position: int) -> tuple[int, ...]:
        """The shards of the block that follows the one of `position`; none at the end of the stream."""
        (_, block), first = _locate(self, position)
        following = first + sum(self.per_shard[s] for s in block)
        return () if self.parts and following == self.total else _locate(self, following)[0][1]


def _locate(order: Order, position: int) -> tuple[tuple[int, tuple[int, ...]], int]:
    """The block of a position, as its round and its shards, and the position where it begins."""
    if order.parts:
        if not 0 <= position < order.total:
            raise ValueError(f"position {position} lies outside the {order.total} sequences of a single pass")
        ends = _part_ends(order)
        number = int(np.searchsorted(ends, position, side="right"))
        begin = int(ends[number - 1]) if number else 0
    else:
        number = position // order.total
        begin = number * order.total
    blocks, ends = _blocks(order, number)
    block = int(np.searchsorted(ends, position - begin, side="right"))
    return (number, blocks[block]), begin + (int(ends[block - 1]) if block else 0)


@lru_cache(maxsize=4)
def _part_ends(order: Order) -> np.ndarray:
    """The position where each part ends."""
    return np.append(0, np.cumsum(order.per_shard))[np.cumsum(order.parts)]


@lru_cache(maxsize=4)
def _blocks(order: Order, number: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The shards of each block of a round and the position in the round where each block ends."""
    shards = np.arange(len(order.per_shard))
    if order.parts:
        shards = np.split(shards, np.cumsum(order.parts))[number]
    if order.seed is not None:
        shards = shuffled(shards, order.seed, number)
    size = order.shuffle_shards
    blocks = [tuple(int(s) for s in shards[i : i + size]) for i in range(0, len(shards), size)]
    return blocks, np.cumsum([sum(order.per_shard[s] for s in block) for block in blocks])


@lru_cache(maxsize=2)
def _block_ids(order: Order, number: int, shards: tuple[int, ...]) -> np.ndarray:
    starts = np.concatenate([[0], np.cumsum(order.per_shard)])
    ids = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])
    return ids if order.seed is None else shuffled(ids, order.seed, number)


def deal(lengths: np.ndarray, costs: np.ndarray, world: int, accumulation: int, lockstep: bool = True) -> np.ndarray:
    """Share a global batch out: indices int64 [world, accumulation, micro] into `lengths`, each index once.

    Sequences of like length meet in the same micro-step on all ranks, so that little is padded. Within a micro-step the longest
    come first, each to the rank that has least to compute so far and a place left (list scheduling: Graham, Bounds on
    multiprocessing timing anomalies, 1969), so that ranks wait for one another as little as may be. The same numbers give the
    same shares anywhere. Where sequences cannot be shared out evenly a place is -1, at most one in each micro-batch, the last
    one, and first where sequences are long.

    Args:
        lengths: of the sequences, [N].
        costs: what computing each takes, in any unit, [N].
        accumulation: micro-steps.
        lockstep: ranks wait for one another in each micro-step, so its costs are what counts; else only those of the whole step.
    """
    room = -(-len(lengths) // (world * accumulation))
    missing = world * accumulation * room - len(lengths)
    order = np.argsort(-lengths, kind="stable")
    out = np.full((world, accumulation, room), -1)
    whole, begin = [0.0] * world, 0
    for step in range(accumulation):
        full = world - min(world, max(0, missing - step * world))  # so many ranks may fill all their places
        part = order[begin : begin + world * (room - 1) + full]
        begin += len(part)
        # Ranks that have a place left: cost so far, that of the whole step, rank, places taken.
        free = [(0.0 if lockstep else whole[rank], whole[rank], rank, 0) for rank in range(world)]
        heapify(free)
        for index, cost in zip(part.tolist(), costs[part].tolist(), strict=True):
            load, of_step, rank, taken = heappop(free)
            while taken == room - 1 and full == 0:
                load, of_step, rank, taken = heappop(free)
            out[rank, step, taken] = index
            whole[rank] += cost
            full -= taken == room - 1
            if taken < room - 1:
                heappush(free, (load + cost, of_step, rank, taken + 1))
    return out


def dealt_in_rows(lengths: np.ndarray, costs: np.ndarray, world: int) -> np.ndarray:
    """As `deal` without micro-steps, int64 [world, micro]: of each `world` next longest sequences every rank gets one, of the
    first some may get none.

    So the n-th sequence of a rank is about as long as the n-th of any other, and what is filled from them one after another
    (`budget.fill`) is alike. No two ranks differ by more than two sequences of one row.
    """
    return deal(lengths, costs, world, -(-len(lengths) // world), lockstep=False)[:, :, 0]
