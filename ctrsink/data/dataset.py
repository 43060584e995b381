"""A prepared data set as the stream sees it: counts of every user at once, chronologies of a shard on demand."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrsink import storage
from ctrsink.data.arrow import unpack
from ctrsink.data.cache import Cache
from ctrsink.data.examples import Chronology, Events, Ragged
from ctrsink.data.manifest import SPLITS, TOKENS_SCHEMA, VECTOR, FileEntry, Manifest, read_file, read_manifest
from ctrsink.data.reading import begin
from ctrsink.data.requests import known_events
from ctrsink.errors import InputError

READERS = 4  # shards of a remote data set that are fetched at a time; a disk is fast enough for one, which takes less memory
COLUMNS = ["user", "item", "timestamp", "feedback_id", "label", "request"]


@dataclass(frozen=True)
class Shard(Events):
    """A shard in memory, [N] events of all its users one after another; `texts` are rows of its own token table."""

    offsets: np.ndarray
    """int64 [users + 1]; rows of each user."""
    items: np.ndarray
    """Rows of the item table, [N]."""
    impressions: np.ndarray
    """Rows with a label, ascending."""
    users: np.ndarray
    """Ids, strings of numpy."""

    def chronology(self, row: int) -> Chronology:
        a, b = self.offsets[row], self.offsets[row + 1]
        return Chronology(self.texts[a:b], self.feedbacks[a:b], self.timestamps[a:b], self.labels[a:b], self.known[a:b])


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
        self.keep_shards, self._cache, self._with_vectors = keep_shards, cache, False
        self._start()
        table = pq.read_table(pa.BufferReader(self._read(self.manifest.index)))
        self.index: dict[str, np.ndarray] = {name: table[name].to_numpy() for name in table.column_names}
        self.feedbacks = Ragged.of(self.manifest.feedback_tokens)
        self.prefix = np.array(self.manifest.prefix_tokens, np.int64)

    def _start(self) -> None:
        self._shards: OrderedDict[int, Future[Shard]] = OrderedDict()
        self._lock = threading.Lock()
        self._readers = threading.Semaphore(READERS if storage.is_remote(self.uri) else 1)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: all but the shards, which it reads itself."""
        return {name: value for name, value in vars(self).items() if name not in ("_shards", "_lock", "_readers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def use_vectors(self) -> None:
        """From now on shards are read with the vectors of their items.

        Raises:
            InputError: the data set has none.
        """
        if self.manifest.encoder is None:
            raise InputError(
                f"the data set {self.uri} has no item vectors, which the signal similarity and data.retrieve need: "
                "prepare it again with prepare.encoder"
            )
        if not self._with_vectors:
            self._with_vectors = True
            self._start()

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
            for number in numbers:
                known = self._shards.get(number)
                # What failed may have been read ahead long ago, and the storage be well again by now.
                if known is None or (known.done() and known.exception() is not None):
                    self._shards[number] = begin(partial(self._load, number), self._readers)
                self._shards.move_to_end(number)
            found = [self._shards[number] for number in numbers]
            while len(self._shards) > self.keep_shards:  # those that were needed longest ago make room
                self._shards.popitem(last=False)
            return found

    def read_ahead(self, numbers: tuple[int, ...]) -> None:
        """Begin to read shards that are needed later; they take at most half of the places from those in use."""
        self._fetch(numbers[: self.keep_shards // 2])

    def _read(self, entry: FileEntry) -> bytes:
        return read_file(self.uri, entry) if self._cache is None else self._cache.read(self.uri, entry)

    def _load(self, number: int) -> Shard:
        entry = self.manifest.shards[number]
        wanted = [*TOKENS_SCHEMA.names, *([VECTOR] if self._with_vectors else [])]
        events, tokens = (
            pq.read_table(pa.BufferReader(self._read(file)), columns=columns, use_threads=False)
            for file, columns in ((entry.events_file, COLUMNS), (entry.tokens_file, wanted))
        )
        return _to_arrays(events, tokens)

    def read_items(self) -> pa.Table:
        """The item table: `id`, text fields, and `text`."""
        return pq.read_table(pa.BufferReader(self._read(self.manifest.items)))


def _to_arrays(events: pa.Table, tokens: pa.Table) -> Shard:
    def flat(name: str) -> pa.Array:
        return events[name].combine_chunks().flatten()

    lists = tokens["tokens"].combine_chunks()
    lengths = np.diff(events["item"].combine_chunks().offsets.to_numpy())
    items = flat("item").to_numpy()
    labels = flat("label").fill_null(-1).to_numpy()
    return Shard(
        texts=np.searchsorted(tokens["item"].to_numpy(), items).astype(np.int32),
        feedbacks=flat("feedback_id").to_numpy(),
        timestamps=flat("timestamp").to_numpy(),
        labels=labels,
        known=known_events(flat("request"), lengths),
        tokens=Ragged(lists.flatten().to_numpy(), np.append(0, np.cumsum(np.diff(lists.offsets.to_numpy())))),
        offsets=np.append(0, np.cumsum(lengths)),
        items=items,
        impressions=np.flatnonzero(labels >= 0).astype(np.int32),
        vectors=unpack(tokens[VECTOR]) if VECTOR in tokens.column_names else None,
        users=np.array(events["user"].to_pylist(), np.dtypes.StringDType()),
    )
