"""The signals of every impression as a table: what a model's targets are told, for anyone's own gradient boosting."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrsink import storage
from ctrsink.data.dataset import Dataset
from ctrsink.data.manifest import SPLITS
from ctrsink.data.shard import Knowing
from ctrsink.features.categories import categories
from ctrsink.features.numbers import number
from ctrsink.features.registry import SIGNALS


def target_numbers(dataset: Dataset) -> tuple[str, ...]:
    """The numbers that targets can be told in this data set."""
    return tuple(name for name in dataset.manifest.numbers if "target" in SIGNALS[name].sides)


def signal_tables(dataset: Dataset, split: str, utc_offset_hours: float = 0.0) -> Iterator[pa.Table]:
    """The impressions of a split, shard by shard, each user's oldest first.

    Returns:
        Tables with `user` (string), `event` (its number in the user's chronology), `item` (row of the item table), `timestamp`,
        `label`, a float32 column for each number that targets can be told, null where it is unknown, `hour` and `weekday`.
    """
    names = target_numbers(dataset)
    neighbours = dataset.read_neighbours() if dataset.manifest.neighbours else None
    past = ("past", *SPLITS[: SPLITS.index(split)])  # pyright: ignore[reportArgumentType]
    for shard_number, entry in enumerate(dataset.manifest.shards):
        events, tokens = dataset.tables(shard_number)
        histories = Knowing.of(dataset.manifest, entry, neighbours).histories(events, tokens)
        own = dataset.index["shard"] == shard_number
        before = np.add.reduce([dataset.index[f"{name}_events"][own] for name in past])
        inside = dataset.index[f"{split}_events"][own]
        lengths = np.diff(events["item"].combine_chunks().offsets.to_numpy())
        numbers = np.arange(len(histories.begins)) - histories.begins
        low, high = before.repeat(lengths), (before + inside).repeat(lengths)
        rows = np.flatnonzero((numbers >= low) & (numbers < high) & (histories.labels >= 0))
        users = events["user"].combine_chunks().take(pa.array(np.arange(len(lengths)).repeat(lengths)[rows]))
        assert histories.items is not None
        columns: dict[str, object] = {
            "user": users,
            "event": numbers[rows],
            "item": histories.items[rows].astype(np.int32),
            "timestamp": histories.timestamps[rows],
            "label": histories.labels[rows],
        }
        for name in names:
            values = number(name, histories)[rows]
            columns[name] = pa.array(values.astype(np.float32), mask=np.isnan(values))
        clock = categories(("hour", "weekday"), histories.timestamps[rows], np.zeros(len(rows)), utc_offset_hours)
        yield pa.table(columns | {name: values.astype(np.int8) for name, values in clock.items()})


def signal_columns(dataset: Dataset, split: str) -> pa.Table:
    """As signal_tables, all shards in one."""
    return pa.concat_tables(signal_tables(dataset, split)).combine_chunks()


def write_signals(uri: str, to: str) -> dict[str, int]:
    """Write `<split>.parquet` with the signals of every impression below `to`, local or s3://; returns their numbers.

    Raises:
        InputError: there is no data set.
    """
    dataset = Dataset(uri, 1)
    counts: dict[str, int] = {}
    for split in SPLITS:
        sink = pa.BufferOutputStream()
        counts[split] = 0
        writer: pq.ParquetWriter | None = None
        for table in signal_tables(dataset, split):
            writer = writer or pq.ParquetWriter(sink, table.schema, compression="zstd")
            writer.write_table(table)
            counts[split] += table.num_rows
        assert writer is not None  # a data set has a shard
        writer.close()
        storage.write_bytes(storage.join(to, f"{split}.parquet"), sink.getvalue().to_pybytes())
    return counts
