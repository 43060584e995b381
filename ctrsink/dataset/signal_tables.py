"""The signals of every impression as a table: what a model's targets are told, for anyone's own gradient boosting."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrsink import storage
from ctrsink.dataset.manifest import SPLITS
from ctrsink.dataset.reader import Dataset
from ctrsink.dataset.shard import Knowing
from ctrsink.features.categories import categories
from ctrsink.features.columns import columns_of
from ctrsink.features.numbers import number
from ctrsink.features.registry import signal


def target_numbers(dataset: Dataset) -> tuple[str, ...]:
    """The numbers that targets can be told in this data set."""
    return tuple(name for name in dataset.manifest.numbers if "target" in signal(name).sides)


def signal_tables(dataset: Dataset) -> Iterator[dict[str, pa.Table]]:
    """The impressions shard by shard and by split, each user's oldest first.

    Those of train are of all parts of the data set, on which models train; those of valid and test of its newest, on which
    they are measured.

    Returns:
        Tables with `user` (string), `event` (its number in the user's chronology), `item` (row of the item table), `timestamp`,
        `label`, a float32 column for each number that targets can be told, null where it is unknown, `hour` and `weekday` (UTC).
    """
    names = target_numbers(dataset)
    told = tuple(column.signal for column in columns_of(names))
    neighbours = dataset.read_neighbours() if dataset.manifest.neighbours else None
    for shard, entry in enumerate(dataset.manifest.shards):
        events, tokens = dataset.tables(shard, told, dataset.manifest.text_line is not None)
        histories = Knowing.of(dataset.manifest, entry, neighbours, told).histories(events, tokens)
        lengths = np.diff(events["item"].combine_chunks().offsets.to_numpy())
        owners = np.arange(len(lengths)).repeat(lengths)
        clock = categories(("hour", "weekday"), histories.timestamps, np.zeros(len(owners)), 0.0)
        assert histories.items is not None
        columns = {
            "user": events["user"].combine_chunks().take(pa.array(owners)),
            "event": np.arange(len(owners)) - histories.begins,
            "item": histories.items.astype(np.int32),
            "timestamp": histories.timestamps,
            "label": histories.labels,
            **{name: pa.array(number(name, histories).astype(np.float32), from_pandas=True) for name in names},
            **{name: values.astype(np.int8) for name, values in clock.items()},
        }
        table = pa.table(columns)
        splits: tuple[str, ...] = SPLITS if shard in dataset.newest else ("train",)
        yield {split: table.filter(pa.array(dataset.within(shard, split) & (histories.labels >= 0))) for split in splits}


def signal_columns(dataset: Dataset) -> dict[str, pa.Table]:
    """As signal_tables, all shards in one."""
    found: dict[str, list[pa.Table]] = {split: [] for split in SPLITS}
    for tables in signal_tables(dataset):
        for split, table in tables.items():
            found[split].append(table)
    return {split: pa.concat_tables(tables).combine_chunks() for split, tables in found.items()}


def write_signals(uri: str, to: str) -> dict[str, int]:
    """Write `<split>.parquet` with the signals of every impression below `to`, local or s3://; returns their numbers.

    Raises:
        InputError: there is no data set.
    """
    sinks: dict[str, pa.BufferOutputStream] = {split: pa.BufferOutputStream() for split in SPLITS}
    writers: dict[str, pq.ParquetWriter] = {}
    counts: dict[str, int] = dict.fromkeys(SPLITS, 0)
    for tables in signal_tables(Dataset(uri, 1)):
        for split, table in tables.items():
            if split not in writers:
                writers[split] = pq.ParquetWriter(sinks[split], table.schema, compression="zstd")
            writers[split].write_table(table)
            counts[split] += table.num_rows
    for split, writer in writers.items():
        writer.close()
        storage.write_bytes(storage.join(to, f"{split}.parquet"), sinks[split].getvalue().to_pybytes())
    return counts
