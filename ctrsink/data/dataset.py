"""A prepared data set as the stream sees it: counts of every user at once, chronologies of a shard on demand."""

import io
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrsink.data.examples import Chronology, Ragged
from ctrsink.data.manifest import SPLITS, Manifest, read_file, read_manifest


@dataclass(frozen=True)
class Shard:
    """A shard in memory, [N] events of all its users one after another."""

    offsets: np.ndarray
    texts: np.ndarray
    feedbacks: np.ndarray
    timestamps: np.ndarray
    labels: np.ndarray
    items: np.ndarray
    """Rows of the item table, [N]."""
    known: np.ndarray
    """See Chronology."""
    tokens: Ragged
    """Token table of the items of this shard; `texts` are its rows."""
    users: list[str]

    def chronology(self, row: int) -> Chronology:
        a, b = self.offsets[row], self.offsets[row + 1]
        return Chronology(self.texts[a:b], self.feedbacks[a:b], self.timestamps[a:b], self.labels[a:b], self.known[a:b])


class Dataset:
    """Reads a prepared data set; every file is checked against the manifest as it is read.

    Args:
        uri: its folder, local or s3://.
        keep_shards: shards held in memory.

    Raises:
        InputError: the manifest or a file is missing, truncated or altered.
    """

    def __init__(self, uri: str, keep_shards: int = 16) -> None:
        self.uri = uri
        self.manifest: Manifest = read_manifest(uri)
        table = pq.read_table(io.BytesIO(read_file(uri, self.manifest.index)))
        self.index: dict[str, np.ndarray] = {name: table[name].to_numpy() for name in table.column_names}
        self.feedbacks = Ragged.of(self.manifest.feedback_tokens)
        self.prefix = np.array(self.manifest.prefix_tokens, np.int64)
        self._keep = keep_shards
        self._shards: OrderedDict[int, Shard] = OrderedDict()

    def events(self, split: str, user: int) -> tuple[int, int]:
        """Range [lo, hi) of the user's events that lie in the split."""
        counts = [int(self.index[f"{s}_events"][user]) for s in ("past", *SPLITS)]
        at = 1 + SPLITS.index(split)  # pyright: ignore[reportArgumentType]
        return sum(counts[:at]), sum(counts[: at + 1])

    def locate(self, user: int) -> tuple[Shard, int]:
        """The shard of a user (a row of the index) and their row in it."""
        return self.shard(int(self.index["shard"][user])), int(self.index["row"][user])

    def shard(self, number: int) -> Shard:
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        entry = self.manifest.shards[number]
        events = pq.read_table(io.BytesIO(read_file(self.uri, entry.events_file)))
        tokens = pq.read_table(io.BytesIO(read_file(self.uri, entry.tokens_file)))
        shard = _to_arrays(events, tokens)
        self._shards[number] = shard
        if len(self._shards) > self._keep:
            self._shards.popitem(last=False)
        return shard

    def read_items(self) -> pa.Table:
        """The item table: `id`, text fields, and `text`."""
        return pq.read_table(io.BytesIO(read_file(self.uri, self.manifest.items)))


def _to_arrays(events: pa.Table, tokens: pa.Table) -> Shard:
    def flat(name: str) -> np.ndarray:
        return events[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)

    lengths = _lengths(events["item"].combine_chunks())
    labels = events["label"].combine_chunks().flatten().fill_null(-1).to_numpy()
    items = flat("item")
    known = tokens["item"].to_numpy()
    token_lists = tokens["tokens"].combine_chunks()
    offsets = np.concatenate([[0], np.cumsum(_lengths(token_lists))])
    return Shard(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        texts=np.searchsorted(known, items),
        feedbacks=flat("feedback_id").astype(np.int64),
        timestamps=flat("timestamp"),
        labels=labels,
        items=items,
        known=_known(events["request"].combine_chunks().flatten(), lengths),
        tokens=Ragged(token_lists.flatten().to_numpy().astype(np.int64), offsets),
        users=events["user"].to_pylist(),
    )


def _lengths(lists: pa.ListArray) -> np.ndarray:
    return np.diff(lists.offsets.to_numpy())


def _known(requests: pa.StringArray, lengths: np.ndarray) -> np.ndarray:
    """How many events of its user come before the request of each event, int64 [N]; without a request an event stands alone."""
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    alone = np.arange(len(requests))
    codes = requests.dictionary_encode().indices.fill_null(-1).to_numpy()
    # Events of one user and one request meet in the place of the first of them.
    keys = np.stack([starts, np.where(codes < 0, -1 - alone, codes)], axis=1)
    _, firsts, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return firsts[inverse.ravel()] - starts
