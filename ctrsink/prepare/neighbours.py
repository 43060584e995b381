"""Third task: the neighbours of a range of items, from what the users of all shards thought of them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array

from ctrsink import storage
from ctrsink.dataset.arrow import from_ipc, to_ipc
from ctrsink.features.histories import Histories
from ctrsink.prepare.results import numbers_of, path_of

PAIRS = 20_000_000  # of items and users' other items that a task goes through, about: this bounds its memory
MOST_TASKS = 512
BATCH = 4_000_000  # opinions that a task holds at a time
_LEAST_COMMON = 2


def opinions(h: Histories) -> pa.Table:
    """What each user thought of each item beyond their own level, of the events counted.

    Returns:
        A row per user and item: `user` (from 0, in their order), `item`, `value`. As metadata the number of `events` and the sum
        of the `squares` of their opinions.
    """
    assert h.items is not None and h.counted is not None
    rows = np.flatnonzero(h.counted)
    _, user = np.unique(h.begins[rows], return_inverse=True)
    size = int(h.items.max(initial=0)) + 1
    keys, firsts = np.unique(user * size + h.items[rows], return_index=True)
    values = h.own[0][rows][firsts]
    table = pa.table({"user": (keys // size).astype(np.int32), "item": (keys % size).astype(np.int32), "value": values})
    squares = float(np.square(h.beyond_user[rows]).sum())
    return table.replace_schema_metadata({"squares": squares.hex(), "events": str(len(rows))})


@dataclass(frozen=True)
class Pairing:
    """All that the third tasks need."""

    folder: str
    opinions: tuple[str, ...]
    """Files of the opinions in each shard."""
    items: int
    ranges: tuple[tuple[int, int], ...]
    """Items [first, end) of each task."""
    partners: int

    def __call__(self, number: int) -> int:
        """Write the neighbours of the items in range `number`; returns that number."""
        storage.write_bytes(path_of(self.folder, number, "pairs"), to_ipc(self._neighbours(*self.ranges[number])))
        return number

    def done(self) -> set[int]:
        return numbers_of(self.folder, "pairs")

    def result(self, number: int) -> pa.Table:
        """`partners`, `products` and `common` of each item of the range."""
        return from_ipc(storage.read_bytes(path_of(self.folder, number, "pairs")))

    def _neighbours(self, first: int, end: int) -> pa.Table:
        """Sums over users are taken batch by batch, in their order: the same bytes whoever computes them."""
        shape = (end - first, self.items)
        common, product = csr_array(shape, dtype=np.int32), csr_array(shape, dtype=np.float64)
        for opinions in _batches(self.opinions, self.items):
            met = csr_array((np.ones(opinions.nnz, np.int32), opinions.indices, opinions.indptr), opinions.shape)
            common = common + met[:, first:end].T @ met
            product = product + opinions[:, first:end].T @ opinions
        found = common.tocoo()
        rows, columns, counts = (np.asarray(values, np.int32) for values in (*found.coords, found.data))
        # Those with the most users in common, never the most similar: see ctrsink.features.neighbours.
        kept = np.flatnonzero((counts >= _LEAST_COMMON) & (columns != rows + first))
        order = kept[np.lexsort((columns[kept], -counts[kept], rows[kept]))]
        starts = np.searchsorted(rows[order], np.arange(end - first))
        order = order[np.arange(len(order)) - starts[rows[order]] < self.partners]
        order = order[np.lexsort((columns[order], rows[order]))]
        rows, columns, counts = rows[order], columns[order], counts[order]
        sums = product[rows, columns] if len(rows) else np.empty(0)
        offsets = pa.array(np.searchsorted(rows, np.arange(end - first + 1)).astype(np.int32))
        lists = {
            "partners": columns.astype(np.int32),
            "products": np.asarray(sums, np.float32),
            "common": counts.astype(np.int32),
        }
        return pa.table({name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in lists.items()})


def _batches(paths: tuple[str, ...], items: int) -> Iterator[csr_array]:
    """The opinions of some shards after another [users, items], float64, about BATCH at a time.

    Each sum costs as much as all pairs found so far, so there are few of them.
    """
    held: list[pa.Table] = []
    for number, path in enumerate(paths, 1):
        held.append(from_ipc(storage.read_bytes(path)))
        if sum(table.num_rows for table in held) >= BATCH or number == len(paths):
            users = [np.bincount(table.column("user").to_numpy()) for table in held]
            begins = np.append(0, np.concatenate(users).cumsum())  # rows are sorted by user
            item, value = (np.concatenate([table.column(name).to_numpy() for table in held]) for name in ("item", "value"))
            yield csr_array((value, item, begins), (len(begins) - 1, items))
            held = []


def cut_items(paths: tuple[str, ...], items: int) -> tuple[tuple[int, int], ...]:
    """Ranges of items whose users have about PAIRS other items in all, or more where these would be more than MOST_TASKS."""
    work = np.zeros(items)
    for path in paths:
        table = from_ipc(storage.read_bytes(path))
        user, item = (table.column(name).to_numpy() for name in ("user", "item"))
        work += np.bincount(item, np.bincount(user)[user] if len(user) else None, items)
    # Every task reads all opinions: of a large log it takes more at a time.
    size = max(PAIRS, work.sum() / MOST_TASKS)
    ends = np.unique(np.searchsorted(np.cumsum(work), np.arange(size, work.sum() + size, size)) + 1)
    bounds = np.unique(np.minimum(np.concatenate([[0], ends, [items]]), items)).tolist()
    return tuple(itertools.pairwise(bounds))


def mean_square(paths: tuple[str, ...]) -> float:
    """Of an opinion, over the events of all shards."""
    squares, events = 0.0, 0
    for path in paths:
        facts = from_ipc(storage.read_bytes(path)).schema.metadata
        squares += float.fromhex(facts[b"squares"].decode())
        events += int(facts[b"events"])
    return squares / events if squares else 1.0  # nothing was known of any item: no similarity
