"""What a data set holds of a range of users already: the history of those of whom new events are appended."""

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrsink.data import chronology
from ctrsink.data.arrow import column_numpy, pc
from ctrsink.data.events import EVENTS_SCHEMA
from ctrsink.data.manifest import Manifest, read_file

# As EVENTS_SCHEMA, with the item's row in the item table.
SCHEMA = EVENTS_SCHEMA.set(EVENTS_SCHEMA.get_field_index("item"), pa.field("item", pa.int32()))


@dataclass(frozen=True)
class Past:
    """The data set as it is before it is appended to."""

    uri: str
    manifest: Manifest
    limit: int
    """Latest events of a user that are taken."""

    def events(self, first: int, end: int, users: pa.Array) -> pa.Table:
        """The latest events of `users`, all of whose prefixes are in [first, end), oldest first for each; SCHEMA."""
        index = pq.read_table(io.BytesIO(read_file(self.uri, self.manifest.index)), columns=["shard", "past_events"])
        shard_of, past = (column_numpy(index, name, 0) for name in ("shard", "past_events"))
        pieces = [SCHEMA.empty_table()]
        for number, shard in enumerate(self.manifest.shards):
            if shard.prefixes[0] < end and first < shard.prefixes[1]:
                table = pq.read_table(io.BytesIO(read_file(self.uri, shard.events_file)))
                pieces.append(_flat(table, past[shard_of == number], users))
        table = pa.concat_tables(pieces)
        found = chronology.chronologies(table.column("user").combine_chunks(), column_numpy(table, "timestamp", 0))
        ends = np.repeat(found.offsets[1:], np.diff(found.offsets))
        return table.take(pa.array(found.order[ends - np.arange(len(ends)) <= self.limit]))


def _flat(shard: pa.Table, past: np.ndarray, users: pa.Array) -> pa.Table:
    """The events of `users` in one shard, a row each, but for those that are past ones there and lie in an earlier shard."""
    rows = np.flatnonzero(pc.is_in(shard.column("user"), value_set=users).to_numpy(zero_copy_only=False))
    shard, past = shard.take(pa.array(rows)), past[rows]
    lists = {name: shard.column(name).combine_chunks() for name in SCHEMA.names if name != "user"}
    offsets = lists["item"].offsets.to_numpy()
    lengths = np.diff(offsets)
    own = np.arange(lengths.sum()) - np.repeat(offsets[:-1] - offsets[0], lengths) >= np.repeat(past, lengths)
    user = shard.column("user").combine_chunks().take(pa.array(np.repeat(np.arange(len(rows)), lengths)))
    arrays = [user if name == "user" else lists[name].flatten() for name in SCHEMA.names]
    return pa.Table.from_arrays(arrays, schema=SCHEMA).filter(pa.array(own))
