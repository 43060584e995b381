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
from ctrsink.sequences.batch import PAD, SINK, TEXT, Batch
from ctrsink.sequences.collate import MULTIPLE
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
        inside = (batch.kinds != PAD).numpy()
        head = np.concatenate([batch.targets[:, 0].numpy(), batch.labels.numpy()], axis=1).astype(np.int64)
        yield Samples(
            head=head,
            lengths=inside.sum(1),
            input_ids=batch.input_ids.numpy()[inside].astype(np.int32),
            kinds=batch.kinds.numpy()[inside],
            event_ids=batch.event_ids.numpy()[inside].astype(np.int16),
            signals=batch.signals.numpy()[batch.sink_valid.numpy()].astype(np.int16).ravel(),
        )


def to_batch(samples: Samples, signals: int) -> Batch:
    """The Batch that ours makes of the same sequences, tensor by tensor; `signals` to a sink, 0 without sinks."""
    rows, lengths = len(samples.lengths), samples.lengths.astype(np.int64)
    length = padded_length(lengths)
    inside = np.arange(length) < lengths[:, None]
    kinds = _pad(samples.kinds, inside, np.uint8)
    event_ids = _pad(samples.event_ids, inside, np.int32)
    last = samples.event_ids[np.cumsum(lengths) - 1]
    is_sink = kinds == SINK
    sinks = is_sink.sum(1)
    slots = max(int(sinks.max()), 1) if signals else 0
    sink_valid = np.arange(slots) < sinks[:, None]
    sink_positions = np.full((rows, slots), length - 1)
    buckets = np.zeros((rows, slots, signals), np.int64)
    if signals:
        sink_positions[sink_valid] = np.nonzero(is_sink)[1]
        buckets[sink_valid] = samples.signals.reshape(-1, signals)
    arrays = {
        "input_ids": _pad(samples.input_ids, inside, np.int64),
        "kinds": kinds,
        "event_ids": event_ids,
        "aligned": (kinds == TEXT) & (event_ids == last[:, None]),
        "candidate": (kinds == TEXT) & (event_ids == last[:, None]),
        "position_ids": np.arange(length) * (kinds != PAD),
        "sink_positions": sink_positions,
        "sink_valid": sink_valid,
        "signals": buckets,
        # No sample holds times or numbers: the runs compared have no use for them.
        "sink_numbers": np.zeros((rows, slots, 0), np.float32),
        "sink_times": np.zeros((rows, slots), np.int64),
        "readout_positions": lengths[:, None] - 1,
        "readout_valid": np.ones((rows, 1), np.bool_),
        "readout_numbers": np.zeros((rows, 1, 0), np.float32),
        "base": np.zeros((rows, 1), np.float32),
        "asked_positions": lengths[:, None] - 1,
        "asked_valid": np.ones((rows, 1), np.bool_),
        "asked_times": np.zeros((rows, 1), np.int64),
        "asked_signals": np.zeros((rows, 1, 0), np.int64),
        "asked_numbers": np.zeros((rows, 1, 0), np.float32),
        "labels": samples.head[:, 2:].astype(np.float32),
        "targets": samples.head[:, None, :2].copy(),
        "similarity": np.zeros((rows, 1, 0), np.float32),
    }
    return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def padded_length(lengths: np.ndarray) -> int:
    """Positions of a row of the batch: at least one of padding, rounded up as ours does it."""
    length = int(lengths.max()) + 1
    return length + -length % MULTIPLE


def _pad(flat: np.ndarray, inside: np.ndarray, dtype: Any) -> np.ndarray:
    out = np.zeros(inside.shape, dtype)
    out[inside] = flat
    return out


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
