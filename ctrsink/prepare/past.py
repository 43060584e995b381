"""What a data set holds of a range of users already: the history of those of whom new events are appended."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ctrsink.dataset import splits
from ctrsink.dataset.arrow import column_numpy, from_parquet, pc
from ctrsink.dataset.manifest import Manifest, column_field, read_file
from ctrsink.features.columns import columns_of
from ctrsink.prepare.check_rows import EVENTS_SCHEMA

# As EVENTS_SCHEMA, with the item's row in the item table, and what was known of the item.
_SCHEMA = (
    EVENTS_SCHEMA.set(EVENTS_SCHEMA.get_field_index("item"), pa.field("item", pa.int32()))
    .append(pa.field("item_mean", pa.float32()))
    .append(pa.field("item_count", pa.int32()))
)


@dataclass(frozen=True)
class Past:
    """The data set as it is before it is appended to."""

    uri: str
    manifest: Manifest
    limit: int
    """Latest events of a user that are taken."""

    @property
    def schema(self) -> pa.Schema:
        """Of these events: with the columns that are signals, of each event."""
        return pa.schema([*_SCHEMA, *(column_field(column) for column in columns_of(self.manifest.columns) if column.by_event)])

    def events(self, first: int, end: int, users: pa.Array) -> pa.Table:
        """The latest events of `users`, all of whose prefixes are in [first, end), oldest first for each; in `schema`.

        From the newest part back, so that no more than `limit` events of a user are held.
        """
        wanted = np.full(len(users), self.limit)
        pieces: list[pa.Table] = []
        for shard in reversed(self.manifest.shards):
            if shard.prefixes[0] < end and first < shard.prefixes[1] and wanted.any():
                table = from_parquet(read_file(self.uri, shard.events_file), self.schema.names)
                pieces.append(_latest(table, self.schema, self.manifest.parts[shard.part].first_time, users, wanted))
        table = pa.concat_tables([self.schema.empty_table(), *reversed(pieces)])
        found = splits.chronologies(table.column("user").combine_chunks(), column_numpy(table, "timestamp", 0))
        return table.take(pa.array(found.order))


def _latest(shard: pa.Table, schema: pa.Schema, first_time: int, users: pa.Array, wanted: np.ndarray) -> pa.Table:
    """Of each of `users` the `wanted` latest events in one shard, which are then wanted no more; a row each.

    Args:
        first_time: of the shard's part; older events are past ones there too, and lie in an earlier shard.
    """
    user = pc.fill_null(pc.index_in(shard.column("user"), users), -1).to_numpy()
    rows = np.flatnonzero(user >= 0)
    lists = {name: shard.column(name).combine_chunks() for name in schema.names if name != "user"}
    offsets = lists["item"].offsets.to_numpy().astype(np.int64)
    ends = offsets[rows + 1]
    own = np.append(0, np.cumsum(lists["timestamp"].values.to_numpy() >= first_time))
    counts = np.minimum(own[ends] - own[offsets[rows]], wanted[user[rows]])
    wanted[user[rows]] -= counts
    places = np.repeat(ends - np.cumsum(counts), counts) + np.arange(counts.sum())
    owners = shard.column("user").combine_chunks().take(pa.array(np.repeat(rows, counts)))
    arrays = [owners if name == "user" else lists[name].values.take(pa.array(places)) for name in schema.names]
    return pa.Table.from_arrays(arrays, schema=schema)
