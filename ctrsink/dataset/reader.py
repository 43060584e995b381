"""A prepared data set as the stream sees it: counts of every user at once, chronologies of a shard on demand."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa

from ctrsink import storage
from ctrsink.config.data import DataSpec
from ctrsink.dataset.arrow import from_parquet
from ctrsink.dataset.background import begin
from ctrsink.dataset.cache import Cache
from ctrsink.dataset.index import read_index
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.manifest import (
    SPLITS,
    VECTOR,
    FileEntry,
    Manifest,
    read_file,
    read_manifest,
    shard_schema,
    tokens_schema,
)
from ctrsink.dataset.shard import Knowing, Shard, read_neighbours, to_shard
from ctrsink.errors import InputError
from ctrsink.features.neighbours import Neighbours
from ctrsink.features.ragged import Ragged

READERS = 4  # shards of a remote data set that are fetched at a time; a disk is fast enough for one, which takes less memory


class Dataset:
    """Reads a prepared data set; every file is checked against the manifest as it is read.

    Args:
        uri: its folder, local or s3://.
        keep_shards: shards held in memory.
        cache: where files of a remote data set are kept on disk; left out, nowhere.

    Raises:
        InputError: the manifest or a file is missing, truncated or altered.
    """

    def __init__(self, uri: str, keep_shards: int = 16, cache: Cache | None = None) -> None:
        self.uri = uri
        self.manifest: Manifest = read_manifest(uri)
        self.keep_shards, self._cache = keep_shards, cache
        self._layout: Layout | None = None
        self._neighbours: Neighbours | None = None
        self._start()
        self.index  # noqa: B018  read now, where a failure is told as that of the data set
        self.first_users = np.append(0, np.cumsum([shard.users for shard in self.manifest.shards]))
        """Rows of the index: where each shard's users begin, and where the last one's end, int64 [shards + 1]."""
        self.feedbacks = Ragged.of(self.manifest.feedback_tokens)
        self.prefix = np.array(self.manifest.prefix_tokens, np.int64)

    @classmethod
    def of(cls, data: DataSpec) -> "Dataset":
        """The data set of a run, which holds the shards that are mixed now and those that come next."""
        return cls(data.uri, 2 * data.shuffle_shards, Cache.of(data.cache))

    def _start(self) -> None:
        self._shards: OrderedDict[tuple[int, Layout | None], Future[Shard]] = OrderedDict()
        self._lock = threading.Lock()
        self._readers = threading.Semaphore(READERS if storage.is_remote(self.uri) else 1)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: all but the shards and the index, which it reads or maps itself."""
        return {name: value for name, value in vars(self).items() if name not in ("_shards", "_lock", "_readers", "index")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def reader(self) -> "Dataset":
        """Another reader of the same data set, with the same index: shards that it opens take no place from those of this one."""
        other = object.__new__(Dataset)
        vars(other).update(vars(self))
        other._start()
        return other

    def use(self, layout: Layout) -> None:
        """From now on shards are read with what sequences of this layout tell of their events.

        Raises:
            InputError: the data set lacks something for it.
        """
        if layout == self._layout:
            return
        layout.require(self.manifest, self.uri)
        if "neighbours" in layout.needs and self._neighbours is None:
            self._neighbours = self.read_neighbours()
        self._layout = layout

    def read_neighbours(self) -> Neighbours:
        """The table of items' neighbours.

        Raises:
            InputError: the data set has none.
        """
        entry = self.manifest.neighbours
        if entry is None:
            raise InputError(f"the data set {self.uri} has no table of neighbours: prepare it again with prepare.neighbours")
        return read_neighbours(self._read(entry.file), entry.variance, entry.shrink, self.manifest.text_line)

    @property
    def newest(self) -> range:
        """Numbers of the shards of the newest part, the one that models are measured on."""
        parts = [entry.part for entry in self.manifest.shards]
        return range(parts.index(parts[-1]), len(parts))

    def within(self, number: int, split: str) -> np.ndarray:
        """Which events of a shard lie in the split, bool [events]."""
        own = slice(*self.first_users[number : number + 2].tolist())
        counts = np.array([self.index[f"{s}_events"][own] for s in ("past", *SPLITS)])
        before, total = counts[: 1 + SPLITS.index(split)].sum(axis=0), counts.sum(axis=0)  # pyright: ignore[reportArgumentType]
        place = np.arange(total.sum()) - (np.cumsum(total) - total).repeat(total)
        return (place >= before.repeat(total)) & (place < (before + self.index[f"{split}_events"][own]).repeat(total))

    def events(self, split: str, user: int) -> tuple[int, int]:
        """Range [lo, hi) of the user's events that lie in the split."""
        counts = [int(self.index[f"{s}_events"][user]) for s in ("past", *SPLITS)]
        at = 1 + SPLITS.index(split)  # pyright: ignore[reportArgumentType]
        return sum(counts[:at]), sum(counts[: at + 1])

    def locate(self, user: int) -> tuple[Shard, int]:
        """The shard of a user (a row of the index) and their row in it."""
        return self.shard(int(self.index["shard"][user])), int(self.index["row"][user])

    def shard(self, number: int) -> Shard:
        (shard,) = self.shards([number])
        return shard

    def shards(self, numbers: Sequence[int]) -> list[Shard]:
        """Several shards, which are read at the same time."""
        return [shard.result() for shard in self._fetch(numbers)]

    def _fetch(self, numbers: Sequence[int]) -> list[Future[Shard]]:
        with self._lock:
            layout = self._layout  # another source of the same data set may set its own before these are read
            keys = [(number, layout) for number in numbers]
            for key in keys:
                known = self._shards.get(key)
                # What failed may have been read ahead long ago, and the storage be well again by now.
                if known is None or (known.done() and known.exception() is not None):
                    self._shards[key] = begin(partial(self._load, *key), self._readers)
                self._shards.move_to_end(key)
            found = [self._shards[key] for key in keys]
            while len(self._shards) > self.keep_shards:  # those that were needed longest ago make room
                self._shards.popitem(last=False)
            return found

    def read_ahead(self, numbers: tuple[int, ...]) -> None:
        """Begin to read shards that are needed later; they take at most half of the places from those in use."""
        self._fetch(numbers[: self.keep_shards // 2])

    def _read(self, entry: FileEntry) -> bytes:
        return read_file(self.uri, entry) if self._cache is None else self._cache.read(self.uri, entry)

    @cached_property
    def index(self) -> dict[str, np.ndarray]:
        """Of each user: shard, row, and events before and in each split; another process reads or maps it when it first asks."""
        return read_index(self.manifest, lambda: self._read(self.manifest.index), self._cache)

    def _load(self, number: int, layout: Layout | None) -> Shard:
        columns = () if layout is None else layout.columns
        events, tokens = self.tables(number, columns, layout is not None and layout.needs_vectors)
        users = layout is not None and "user_id" in layout.names
        knowing = Knowing.of(self.manifest, self.manifest.shards[number], self._neighbours, columns, users)
        return to_shard(events, tokens, layout, knowing)

    def tables(self, number: int, columns: tuple[str, ...] = (), vectors: bool = False) -> tuple[pa.Table, pa.Table]:
        """A shard's events and its sidecar, with those signals that are `columns`, and the items' `vectors`, if asked for."""
        entry = self.manifest.shards[number]
        wanted = [*tokens_schema(columns, None).names, *([VECTOR] if vectors else [])]
        events, tokens = (
            from_parquet(self._read(file), columns=columns, threads=False)
            for file, columns in ((entry.events_file, shard_schema(columns).names), (entry.tokens_file, wanted))
        )
        return events, tokens

    def read_items(self) -> pa.Table:
        """The item table: `id`, text fields, and `text`."""
        return from_parquet(self._read(self.manifest.items))
