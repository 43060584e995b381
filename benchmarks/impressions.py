"""Impressions as the other loaders like them best: a sample each, built and tokenised before; and from samples to a Batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.optional import mosaic
from ctrsink.attention.kinds import SINK, TEXT
from ctrsink.sequences.batch import Axis, Batch, Targets
from ctrsink.stream.order import Order
from ctrsink.stream.stream import SequenceSource

PARQUET_FILES = 16
ROW_GROUP = 1000  # also what the Parquet reader of `datasets` hands on at a time
MDS_SHARD = 1 << 26  # bytes, the default of MDSWriter


@dataclass(frozen=True)
class Samples:
    """B sequences one after another, N positions in all; what a form holds, with the dtypes it holds it in."""

    head: np.ndarray
    """int64 [B, 3]: row of the user, number of the target event, label."""
    lengths: np.ndarray
    """int64 [B]."""
    input_ids: np.ndarray
    """int32 [N]."""
    kinds: np.ndarray
    """uint8 [N]."""
    event_ids: np.ndarray
    """int16 [N]."""
    signals: np.ndarray
    """int16 [K * S] of the K sinks of all rows."""

    @property
    def signal_counts(self) -> np.ndarray:
        """Entries of `signals` that belong to each row, int64 [B]."""
        sinks = np.add.reduceat(self.kinds == SINK, np.cumsum(self.lengths) - self.lengths)
        return sinks * (len(self.signals) // max(1, int(sinks.sum())))


def read_samples(source: SequenceSource, chunk: int = 256) -> Iterator[Samples]:
    """All sequences of the source (per_target) in their natural order, `chunk` at a time."""
    order = Order(source.per_shard, None)
    for start in range(0, order.total, chunk):
        batch = source.build(order.ids(start, min(chunk, order.total - start)))
        of, read = batch.targets, {name: column.numpy() for name, column in batch.inputs.items()}
        yield Samples(
            head=np.stack([of.users.numpy(), of.events.numpy(), of.labels.numpy().astype(np.int64)], axis=1),
            lengths=batch.axes["positions"].lengths,
            input_ids=read["input_ids"].astype(np.int32),
            kinds=read["kinds"],
            event_ids=read["event_ids"].astype(np.int16),
            signals=read["signals"].astype(np.int16).ravel(),
        )


def to_batch(samples: Samples, signals: int) -> Batch:
    """The Batch that ours makes of the same sequences, tensor by tensor; `signals` to a sink, 0 without sinks."""
    rows, lengths = len(samples.lengths), samples.lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    kinds, event_ids = samples.kinds.astype(np.uint8), samples.event_ids.astype(np.int32)
    last = event_ids[ends - 1]
    target = (kinds == TEXT) & (event_ids == last.repeat(lengths))
    is_sink = kinds == SINK
    sinks = np.add.reduceat(is_sink, starts, dtype=np.int64)
    one, texts = np.ones(rows, np.int64), np.add.reduceat(target, starts, dtype=np.int64)
    arrays = {
        "input_ids": samples.input_ids.astype(np.int64),
        "kinds": kinds,
        "event_ids": event_ids,
        "aligned": target,
        "candidate": target,
        "position_ids": np.arange(ends[-1]) - starts.repeat(lengths),
        "sink_positions": np.flatnonzero(is_sink),
        "signals": samples.signals.reshape(len(samples.signals) // max(1, signals), signals).astype(np.int64),
        # No sample holds times or numbers, nor what it costs: the runs compared have no use for them.
        "sink_numbers": np.zeros((int(sinks.sum()), 0), np.float32),
        "sink_times": np.zeros(int(sinks.sum()), np.int64),
        "readout_positions": ends - 1,
        "readout_numbers": np.zeros((rows, 0), np.float32),
        "base": np.zeros(rows, np.float32),
        "asked_positions": ends - 1,
        "asked_times": np.zeros(rows, np.int64),
        "asked_signals": np.zeros((rows, 0), np.int64),
        "asked_numbers": np.zeros((rows, 0), np.float32),
        "similarity": np.zeros(0, np.float32),
    }
    counts = {"positions": lengths, "sinks": sinks, "targets": one, "asked": one, "pairs": 0 * one, "aligned": texts}
    counts |= {"candidates": 0 * one, "asked_rows": one, "places": last.astype(np.int64), "span": lengths}
    users, events, labels = torch.from_numpy(samples.head.copy()).unbind(1)
    valid = torch.ones(rows, dtype=torch.bool)
    return Batch(
        targets=Targets(labels.float(), users, events, torch.zeros_like(events), valid),
        inputs={name: torch.from_numpy(array) for name, array in arrays.items()},
        axes={name: Axis.of(count) for name, count in counts.items()},
        tokens=int(ends[-1]),
        impressions=rows,
    )


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """What two loaders must agree on, by name: all but times, which samples do not hold."""
    columns = {name: value for name, value in (vars(batch.targets) | batch.inputs).items() if not name.endswith("times")}
    return columns | {f"bounds of {name}": axis.offsets for name, axis in batch.axes.items()}


def write_parquet(folder: Path, chunks: Iterator[Samples], total: int) -> None:
    """The samples in PARQUET_FILES files of lists and numbers."""
    folder.mkdir(parents=True)
    pending: list[pa.Table] = []
    held, number, per_file = 0, 0, -(-total // PARQUET_FILES)
    for samples in chunks:
        pending.append(_table(samples))
        held += len(samples.lengths)
        while held >= per_file:
            table = pa.concat_tables(pending)
            pq.write_table(table.slice(0, per_file), folder / f"{number:05d}.parquet", row_group_size=ROW_GROUP)
            pending, held, number = [table.slice(per_file)], held - per_file, number + 1
    if held:
        pq.write_table(pa.concat_tables(pending), folder / f"{number:05d}.parquet", row_group_size=ROW_GROUP)


def _table(samples: Samples) -> pa.Table:
    def lists(flat: np.ndarray, counts: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), flat)

    columns: dict[str, Any] = {name: samples.head[:, i] for i, name in enumerate(("user", "event", "label"))}
    columns |= {name: lists(getattr(samples, name), samples.lengths) for name in ("input_ids", "kinds", "event_ids")}
    return pa.table(columns | {"signals": lists(samples.signals, samples.signal_counts)})


def write_mds(folder: Path, chunks: Iterator[Samples]) -> None:
    """The samples as MDS shards, not compressed; arrays as bytes, which are the cheapest to read back."""
    columns = dict.fromkeys(("head", "input_ids", "kinds", "event_ids", "signals"), "bytes")
    with mosaic().MDSWriter(out=str(folder), columns=columns, size_limit=MDS_SHARD) as writer:
        for samples in chunks:
            at, signals_at = np.cumsum(samples.lengths)[:-1], np.cumsum(samples.signal_counts)[:-1]
            parts = {name: np.split(getattr(samples, name), at) for name in ("input_ids", "kinds", "event_ids")}
            parts |= {"head": list(samples.head), "signals": np.split(samples.signals, signals_at)}
            for row in range(len(samples.lengths)):
                writer.write({name: arrays[row].tobytes() for name, arrays in parts.items()})
