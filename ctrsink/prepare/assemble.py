"""Second task: the users of one range of prefixes become a shard, its token sidecar and its piece of the index."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ctrsink import storage
from ctrsink.dataset import splits
from ctrsink.dataset.arrow import column_numpy, from_ipc, pc, to_ipc, to_parquet
from ctrsink.dataset.known import known_events
from ctrsink.dataset.manifest import VECTOR, FileEntry, ShardEntry, SplitTimes, column_field, shard_schema, tokens_schema
from ctrsink.dataset.shard import Knowing
from ctrsink.dataset.splits import NO_LABEL, PAST, Chronologies
from ctrsink.features.columns import columns_of
from ctrsink.features.counted import Counted
from ctrsink.prepare.neighbours import opinions
from ctrsink.prepare.partition import Partition, read_lookup
from ctrsink.prepare.past import Past
from ctrsink.prepare.pile import Pile
from ctrsink.prepare.render import feedback_ids
from ctrsink.prepare.results import column_of, numbers_of, path_of
from ctrsink.prepare.statistics import Rule, read_received


@dataclass(frozen=True)
class Assembly:
    """All that the second tasks need."""

    partition: Partition
    to: str
    """The data set."""
    folder: str
    """Where what is known of finished shards lies."""
    pile: Pile
    """All events."""
    ranges: tuple[tuple[int, int], ...]
    """Prefixes [first, end) of each shard."""
    split_times: SplitTimes
    feedback_texts: tuple[str, ...]
    items: str
    """File of the ids of all items, see Lookup."""
    tokens: str
    """File of the tokens of all items."""
    fields: str
    """File of the values that items have in their fields."""
    vectors: str | None
    """File of the vectors of all items, where they have any."""
    received: str
    """File of how items were received, by period."""
    values: str
    """File of the values of all items in columns that are signals."""
    groups: dict[str, tuple[str, str]]
    """Of a column of the item table whose outcomes are counted: file of each item's group, and of how groups were received."""
    counted: Counted | None
    """Which events are opinions that neighbours are made of; None: there are none to be made."""
    part: int
    first_shard: int
    """Number of the part's first shard in the data set."""
    past: Past | None
    """What came before the log, where it is appended."""

    def __call__(self, number: int) -> int:
        """Write shard `number` of the part; returns that number, once its entry is written, last."""
        events, past = self._events(number)
        again = splits.duplicates(events) & ~past
        if self.partition.spec.duplicates == "drop":
            events, past = events.filter(pa.array(~again)), past[~again]
        found = splits.chronologies(events.column("user").combine_chunks(), column_numpy(events, "timestamp", 0))
        order = pa.array(found.order)
        events, past = events.take(order).combine_chunks(), past[found.order]
        feedback = column_numpy(events, "feedback", np.nan)
        label = self.partition.labels(events)
        split = np.where(past, PAST, splits.split_of(column_numpy(events, "timestamp", 0), self.split_times))
        texts = self.partition.spec.text
        columns = {
            "item": events.column("item"),
            "timestamp": events.column("timestamp"),
            "feedback": events.column("feedback"),
            "feedback_id": pa.array(feedback_ids(texts, self.feedback_texts, feedback)),
            "label": pa.array(label, mask=label == NO_LABEL),
            "request": _requests(events, self.partition.spec.request_is_second),
            "item_mean": events.column("item_mean"),
            "item_count": events.column("item_count"),
        }
        told = columns_of(self.partition.spec.columns)
        columns |= {column.signal: events.column(column.signal) for column in told if column.by_event}
        table = _shard(columns, found, shard_schema(self.partition.spec.columns))
        mentioned = pc.unique(columns["item"]).sort()
        of_items = [(self.tokens, "tokens"), (self.fields, "fields")]
        of_items += [(self.values, column.signal) for column in told if not column.by_event]
        of_items += [(self.vectors, VECTOR)] if self.vectors else []
        kept = [column_of(path, name).take(mentioned) for path, name in of_items]
        width = kept[-1].type.byte_width // 2 if self.vectors else None
        sidecar = pa.Table.from_arrays([mentioned, *kept], schema=tokens_schema(self.partition.spec.columns, width))
        place = np.searchsorted(mentioned.to_numpy(), columns["item"].to_numpy())
        lengths = pc.list_value_length(sidecar.column("tokens")).to_numpy()[place]
        known = known_events(columns["request"].combine_chunks(), np.diff(found.offsets))
        behind = known < np.arange(len(known)) - found.offsets[:-1].repeat(np.diff(found.offsets))
        shard = self.first_shard + number
        name = f"shards/{shard:05d}"
        entry = ShardEntry(
            part=self.part,
            prefixes=self.ranges[number],
            users=len(found.users),
            events=int((~past).sum()),
            duplicates=int(again.sum()),
            events_file=put(self.to, name, ".parquet", to_parquet(table), self.past is not None),
            tokens_file=put(self.to, name, ".tokens.parquet", to_parquet(sidecar), self.past is not None),
            shared=int((behind & (label != NO_LABEL) & ~past).sum()),
            longest=splits.longest_runs(lengths, found.offsets),
        )
        if self.counted is not None:
            outcome = "feedback" if self.partition.source.columns.feedback is not None else "label"
            histories = Knowing(outcome, self.counted, self.partition.spec.statistics.user_events).histories(table, sidecar)
            storage.write_bytes(self.path(number, "opinions"), to_ipc(opinions(histories)))
        index = to_ipc(splits.user_index(found.offsets, split, label, shard))
        storage.write_bytes(self.path(number, "index"), index)
        storage.write_bytes(self.path(number, "entry"), entry.model_dump_json().encode())
        return number

    def done(self) -> set[int]:
        """Shards that an earlier preparation has finished already."""
        return numbers_of(self.folder, "entry")

    def result(self, number: int) -> tuple[ShardEntry, pa.Table]:
        """A finished shard's entry and piece of the index."""
        entry = ShardEntry.model_validate_json(storage.read_bytes(self.path(number, "entry")))
        return entry, from_ipc(storage.read_bytes(self.path(number, "index")))

    def _events(self, number: int) -> tuple[pa.Table, np.ndarray]:
        """Events of all blocks in the order of the log, items by number, and which of them are past ones."""
        first, end = self.ranges[number]
        table = self.pile.users(first, end).drop_columns("prefix")
        items = read_lookup(self.items).find(table.column("item"))
        table = table.set_column(table.column_names.index("item"), "item", pa.array(items))
        times = column_numpy(table, "timestamp", 0)
        rule = Rule.of(self.partition.spec.statistics)
        mean, count = read_received(self.received).before(rule, items, times)
        table = table.append_column("item_mean", pa.array(mean.astype(np.float32), mask=np.isnan(mean)))
        table = table.append_column("item_count", pa.array(count.astype(np.int32)))
        grouped = {
            name: read_received(received).before(rule, column_of(groups, "group").to_numpy()[items], times)
            for name, (groups, received) in self.groups.items()
        }
        for column in columns_of(self.partition.spec.columns):
            if column.received:
                values = grouped[column.name][0 if column.kind == "mean" else 1]
                stored = pa.array(values, column_field(column).type, mask=np.isnan(values), safe=False)
                table = table.append_column(column.signal, stored)
        if self.past is None:
            return table, np.zeros(table.num_rows, bool)
        past = self.past.events(first, end, table.column("user").unique())
        return pa.concat_tables([past, table.select(past.column_names)]), np.arange(
            past.num_rows + table.num_rows
        ) < past.num_rows

    def path(self, number: int, kind: str) -> str:
        return path_of(self.folder, number, kind)


def _requests(events: pa.Table, seconds: bool) -> pa.ChunkedArray:
    """Ids of requests; `seconds`: where there is none, the second, so that what a user met in one is one request."""
    given = events.column("request")
    return pc.coalesce(given, pc.cast(events.column("timestamp"), pa.string())) if seconds else given


def put(to: str, name: str, ending: str, content: bytes, appended: bool = False) -> FileEntry:
    """Write a file of the data set `to`, for its manifest.

    An `appended` one carries its hash in its name, so that no append can overwrite a file of another.
    """
    digest = storage.sha256(content)
    path = f"{name}-{digest[:12]}{ending}" if appended else f"{name}{ending}"
    storage.write_bytes(storage.join(to, path), content)
    return FileEntry(path=path, bytes=len(content), sha256=digest)


def _shard(columns: dict[str, pa.ChunkedArray | pa.Array], users: Chronologies, schema: pa.Schema) -> pa.Table:
    """The chronologies, in `schema`; `columns` run over all events."""
    offsets = pa.array(users.offsets.astype(np.int32))
    arrays: list[pa.Array] = [pa.array(users.users, pa.string())]
    for name in schema.names[1:]:
        values = columns[name]
        arrays.append(
            pa.ListArray.from_arrays(offsets, values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values)
        )
    return pa.Table.from_arrays(arrays, schema=schema)
