"""Sequences of different length become one Batch, padded on the right."""

import numpy as np
import torch

from ctrsink.sequences.batch import Batch
from ctrsink.sequences.columns import Sequence, Sequences
from ctrsink.features.ragged import ranges

MULTIPLE = 8  # lengths are rounded up to this: fewer distinct shapes, aligned kernels


def collate(sequences: list[Sequence], users: list[int], counted: list[bool] | None = None) -> Batch:
    """The batch of all `sequences`; see collate_rows."""
    return collate_rows(
        Sequences.of(sequences), np.arange(len(sequences)), np.array(users), None if counted is None else np.array(counted)
    )


def collate_rows(sequences: Sequences, rows: np.ndarray, users: np.ndarray, counted: np.ndarray | None = None) -> Batch:
    """Pad some of the sequences to one length, with at least one padded position per row (see Batch).

    Args:
        sequences: N of them.
        rows: int64 [B]; which ones, in the order of the batch.
        users: int64 [B]; row of each one's user in the data set's index.
        counted: bool [B]; False makes a row's readouts invalid: it only fills the batch.
    """
    columns = sequences.columns
    starts, stops = sequences.positions[rows], sequences.positions[rows + 1]
    length = int((stops - starts).max()) + 1
    length += -length % MULTIPLE
    long = [columns.input_ids, columns.kinds, columns.event_ids, columns.aligned, columns.candidate, columns.position_ids]
    padded = [np.zeros((len(rows), length), column.dtype) for column in long]
    # Row by row: copying a stretch is faster than an index for each of its positions.
    for row, (a, b) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        for column, out in zip(long, padded, strict=True):
            out[row, : b - a] = column[a:b]
    # At least one slot where there are sinks at all: every rank runs every module, whatever its batch holds.
    sinks = _Slots(sequences.sinks, rows, min(1, columns.signals.shape[1] + columns.sink_numbers.shape[1]))
    readouts = _Slots(sequences.targets, rows, 1)
    asked = _Slots(sequences.asked, rows, 1)
    owners = np.full((*readouts.valid.shape, 2), -1)
    owners[..., 0][readouts.valid] = users.repeat(readouts.lengths)
    owners[..., 1] = readouts.fill(columns.targets, -1)
    arrays = [
        *padded,
        sinks.fill(columns.sink_positions, length - 1),
        sinks.valid,
        sinks.fill(columns.signals, 0),
        sinks.fill(columns.sink_numbers, 0),
        sinks.fill(columns.sink_times, 0),
        readouts.fill(columns.readout_positions, length - 1),
        readouts.valid if counted is None else readouts.valid & counted[:, None],
        readouts.fill(columns.readout_numbers, 0),
        readouts.fill(columns.base, 0),
        asked.fill(columns.asked_positions, length - 1),
        asked.valid if counted is None else asked.valid & counted[:, None],
        asked.fill(columns.asked_times, 0),
        asked.fill(columns.asked_signals, 0),
        asked.fill(columns.asked_numbers, 0),
        readouts.fill(columns.labels.astype(np.float32), 0),
        owners,
        _pairs(sequences, rows, asked, sinks),
    ]
    return Batch(*map(torch.from_numpy, arrays))


class _Slots:
    """A table [B, at least `least`] with a row for each of the `rows` of ragged columns that have these `bounds`."""

    def __init__(self, bounds: np.ndarray, rows: np.ndarray, least: int) -> None:
        starts = bounds[rows]
        self.lengths = bounds[rows + 1] - starts
        self.valid = np.arange(max(int(self.lengths.max()), least)) < self.lengths[:, None]
        self._chosen = ranges(starts, self.lengths)

    def fill(self, column: np.ndarray, value: float) -> np.ndarray:
        out = np.full((*self.valid.shape, *column.shape[1:]), value, column.dtype)
        out[self.valid] = column[self._chosen]
        return out


def _pairs(sequences: Sequences, rows: np.ndarray, asked: _Slots, sinks: _Slots) -> np.ndarray:
    """The similarity of those asked and sinks, float32 [B, M, K], or [B, M, 0]."""
    values, bounds = sequences.columns.similarity, sequences.pairs
    out = np.zeros((*asked.valid.shape, sinks.valid.shape[1] if len(values) else 0), np.float32)
    if len(values):
        for number, (row, events, count) in enumerate(zip(rows.tolist(), asked.lengths, sinks.lengths, strict=True)):
            out[number, :events, :count] = values[bounds[row] : bounds[row + 1]].reshape(events, count)
    return out
