"""Sequences of different length become one Batch, padded on the right."""

import numpy as np
import torch

from ctrsink.batch import Batch
from ctrsink.data.examples import Sequence

MULTIPLE = 8  # lengths are rounded up to this: fewer distinct shapes, aligned kernels


def collate(sequences: list[Sequence], users: list[int], counted: list[bool] | None = None) -> Batch:
    """Pad `sequences` to one length, with at least one padded position per row (see Batch).

    Args:
        sequences: B of them.
        users: row of each one's user in the data set's index.
        counted: False makes a row's readouts invalid: it only fills the batch.
    """
    length = max(len(s.input_ids) for s in sequences) + 1
    length += -length % MULTIPLE
    # At least one slot where there are sinks at all: every rank runs every module, whatever its batch holds.
    slots = max(max(len(s.sink_positions) for s in sequences), min(1, sequences[0].signals.shape[1]))
    readouts = max(len(s.targets) for s in sequences)
    valid = _pad(
        [np.ones(len(s.targets), np.bool_) & (counted is None or counted[i]) for i, s in enumerate(sequences)], readouts, False
    )
    owners = [np.stack([np.full(len(s.targets), u), s.targets], axis=1) for s, u in zip(sequences, users, strict=True)]
    return Batch(
        input_ids=_pad([s.input_ids for s in sequences], length, 0),
        kinds=_pad([s.kinds for s in sequences], length, 0),
        event_ids=_pad([s.event_ids for s in sequences], length, 0),
        aligned=_pad([s.aligned for s in sequences], length, False),
        sink_positions=_pad([s.sink_positions for s in sequences], slots, length - 1),
        sink_valid=_pad([np.ones(len(s.sink_positions), np.bool_) for s in sequences], slots, False),
        signals=_pad([s.signals for s in sequences], slots, 0),
        readout_positions=_pad([s.readout_positions for s in sequences], readouts, length - 1),
        readout_valid=valid,
        labels=_pad([s.labels.astype(np.float32) for s in sequences], readouts, 0.0),
        targets=_pad(owners, readouts, -1),
    )


def _pad(rows: list[np.ndarray], length: int, value: float) -> torch.Tensor:
    out = np.full((len(rows), length, *rows[0].shape[1:]), value, rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)
