"""The number of an item by its id, in a table that is mapped from disk: no task builds or holds one of all ids."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ctrsink.dataset.arrow import column_numpy, pc

_AT_ONCE = 2**16  # ids are Python strings while they are hashed


@dataclass(frozen=True)
class Lookup:
    """Ids by their number, and the numbers in the order of the ids' hashes."""

    ids: pa.Array
    """Strings [N], each once."""
    hashes: np.ndarray
    """uint64 [N], ascending: the first bits of the sha256 of ids."""
    numbers: np.ndarray
    """int32 [N]; of the id of each hash."""

    @classmethod
    def of(cls, ids: pa.Array) -> "Lookup":
        hashes = _hashes(ids)
        order = np.argsort(hashes, kind="stable")
        return cls(ids, hashes[order], order.astype(np.int32))

    def table(self) -> pa.Table:
        """As it is stored."""
        return pa.table({"item": self.ids, "hash": self.hashes, "number": self.numbers})

    @classmethod
    def from_table(cls, table: pa.Table) -> "Lookup":
        """What `table` gave, of one chunk, and no copy of it."""
        if not table.num_rows:
            return cls.of(pa.array([], pa.string()))
        return cls(table.column("item").chunk(0), *(table.column(name).chunk(0).to_numpy() for name in ("hash", "number")))

    def find(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """The number of each id, int32 [len(ids)]; -1 where there is none, or the id is null. Takes the time of the ids asked."""
        coded = (ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids).dictionary_encode()
        asked, found = coded.dictionary, np.full(len(coded.dictionary) + 1, -1, np.int32)  # the last one stands for null
        hashes = _hashes(asked)
        place, left = np.searchsorted(self.hashes, hashes), np.arange(len(asked))
        while True:  # once, but for ids that share a hash with another
            left = left[place[left] < len(self.hashes)]
            left = left[self.hashes[place[left]] == hashes[left]]
            if not len(left):
                break
            numbers = self.numbers[place[left]]
            same = column_numpy(pa.table({"": pc.equal(self.ids.take(pa.array(numbers)), asked.take(pa.array(left)))}), "", False)
            found[left[same]] = numbers[same]
            left = left[~same]
            place[left] += 1
        return found[coded.indices.fill_null(len(asked)).to_numpy()]


def _hashes(ids: pa.Array) -> np.ndarray:
    out = np.empty(len(ids), np.uint64)
    for start in range(0, len(ids), _AT_ONCE):
        some = ids.slice(start, _AT_ONCE).to_pylist()
        out[start : start + len(some)] = np.frombuffer(b"".join(hashlib.sha256(i.encode()).digest()[:8] for i in some), "<u8")
    return out
