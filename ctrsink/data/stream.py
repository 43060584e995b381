"""The stream: position in, micro-batches out; the same global batches whatever the number of workers."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ctrsink.batch import Batch
from ctrsink.data.collate import collate
from ctrsink.data.dataset import Dataset
from ctrsink.data.examples import Layout, Sequence, build_sequence
from ctrsink.data.manifest import SPLITS
from ctrsink.data.order import Order, deal
from ctrsink.errors import InputError

T = TypeVar("T")
WINDOW = 64  # rounds of evaluation batches whose sequences are sorted by length


class SequenceSource:
    """The sequences of one split, numbered shard by shard, user by user, piece by piece."""

    def __init__(self, dataset: Dataset, split: str, layout: Layout) -> None:
        self.dataset, self.split, self.layout = dataset, split, layout
        impressions = dataset.index[f"{split}_impressions"].astype(np.int64)
        self._pieces = -(-impressions // layout.targets)
        self._starts = np.concatenate([[0], np.cumsum(self._pieces)])
        self._impressions = impressions
        shards = np.bincount(dataset.index["shard"], self._pieces, len(dataset.manifest.shards))
        self.per_shard = tuple(int(n) for n in shards)
        self._past = np.sum([dataset.index[f"{s}_events"] for s in ("past", *SPLITS[: SPLITS.index(split)])], axis=0)
        if not sum(self.per_shard):
            raise InputError(f"the data set {dataset.uri} has no impression in its {split} split")

    def owners(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """User (row of the index) and number of the piece of each sequence."""
        users = np.searchsorted(self._starts, ids, side="right") - 1
        return users, ids - self._starts[users]

    def impressions(self, ids: np.ndarray) -> np.ndarray:
        """Targets of each sequence, known without opening a shard."""
        users, pieces = self.owners(ids)
        return np.minimum(self.layout.targets, self._impressions[users] - pieces * self.layout.targets)

    def lengths(self, ids: np.ndarray) -> np.ndarray:
        """Events of each sequence, about: exact where every event is an impression."""
        users, pieces = self.owners(ids)
        return self.impressions(ids) + np.minimum(self.layout.history, self._past[users] + pieces * self.layout.targets)

    def build(self, ids: np.ndarray, counted: np.ndarray | None = None) -> Batch:
        """The sequences `ids` as one batch; where `counted` is False a row only fills it."""
        users, pieces = self.owners(ids)
        sequences = [self._sequence(int(u), int(p)) for u, p in zip(users, pieces, strict=True)]
        return collate(sequences, users.tolist(), None if counted is None else counted.tolist())

    def _sequence(self, user: int, piece: int) -> Sequence:
        shard, row = self.dataset.locate(user)
        chronology = shard.chronology(row)
        targets = chronology.piece(*self.dataset.events(self.split, user), piece, self.layout.targets)
        return build_sequence(chronology, targets, self.layout, shard.tokens, self.dataset.feedbacks, self.dataset.prefix)


@dataclass(frozen=True)
class Step:
    """What one rank does in one optimiser step."""

    micro_batches: list[Batch]
    impressions: int
    """Of the global batch, over all ranks."""
    position: int
    """Of the stream after this step."""


class TrainStream:
    """Steps of a global batch each, striped over ranks; its only state is the position that a caller passes in."""

    def __init__(
        self, source: SequenceSource, seed: int, shuffle_shards: int, batch_size: int, accumulation: int, rank: int, world: int
    ) -> None:
        self.source = source
        self.order = Order(source.per_shard, seed, shuffle_shards)
        self.batch_size, self.accumulation, self.rank, self.world = batch_size, accumulation, rank, world

    def step(self, position: int) -> Step:
        """The step that starts at `position`: sequences consumed since the run began, over all epochs."""
        ids = self.order.ids(position, self.batch_size)
        mine = deal(self.source.lengths(ids), self.world, self.accumulation)[self.rank]
        batches = [self.source.build(ids[chosen]) for chosen in mine]
        return Step(batches, int(self.source.impressions(ids).sum()), position + self.batch_size)

    def steps(self, position: int, count: int) -> Iterator[Step]:
        """`count` steps from `position` on, built in a thread while the caller computes."""
        return read_ahead(lambda i: self.step(position + i * self.batch_size), count)


def evaluation_batches(source: SequenceSource, batch_size: int, rank: int, world: int, sample: int | None) -> Iterator[Batch]:
    """Every sequence of the split once over all ranks (or a fixed random `sample`), equally many batches on each rank."""
    ids = Order(source.per_shard, None if sample is None else 0, len(source.per_shard)).ids(0, sum(source.per_shard))[:sample]
    # Like lengths together, but only within a window of neighbours: a reader holds few shards at a time.
    ids = np.sort(ids)
    ids = ids[np.lexsort((-source.lengths(ids), np.arange(len(ids)) // (WINDOW * batch_size * world)))]
    rounds = -(-len(ids) // (batch_size * world))
    padded = np.resize(ids, rounds * batch_size * world).reshape(rounds, batch_size, world)[:, :, rank]
    counted = (np.arange(padded.size * world) < len(ids)).reshape(rounds, batch_size, world)[:, :, rank]
    return read_ahead(lambda i: source.build(padded[i], counted[i]), rounds)


def read_ahead(make: Callable[[int], T], count: int, depth: int = 2) -> Iterator[T]:
    """`make(0) .. make(count - 1)`, at most `depth` of them made before they are asked for; an error is raised in its turn."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def work() -> None:
        for i in range(count):
            try:
                made: tuple[T | None, BaseException | None] = (make(i), None)
            except BaseException as error:
                made = (None, error)
            while not stopped.is_set():
                try:
                    ready.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stopped.is_set() or made[1] is not None:
                return

    threading.Thread(target=work, daemon=True, name="ctrsink-read-ahead").start()
    try:
        for _ in range(count):
            value, error = ready.get()
            if error is not None:
                raise error
            yield value  # pyright: ignore[reportReturnType]
    finally:
        stopped.set()
