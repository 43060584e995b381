"""Some of many sequences become one Batch."""

import numpy as np
import torch

from ctrsink.sequences.batch import Axis, Batch, Targets
from ctrsink.sequences.columns import TARGETS, Sequences, spans

_OF_TARGETS = ("labels", "events", "times")


def collate(sequences: Sequences, rows: np.ndarray, users: np.ndarray, counted: np.ndarray | None = None) -> Batch:
    """The batch of the sequences `rows`, nothing padded.

    Args:
        sequences: N of them.
        rows: int64 [B]; which ones, in the order of the batch.
        users: int64 [B]; row of each one's user in the data set's index.
        counted: bool [B]; False where a row only fills the batch: its targets are not counted.
    """
    axes = {name: Axis.of(np.diff(bounds)[rows]) for name, bounds in sequences.bounds.items()}
    # Stretch by stretch: copying is faster than an index for each row.
    parts = {name: spans(bounds, rows) for name, bounds in sequences.bounds.items()}
    columns: dict[str, np.ndarray] = {}
    for name, column in sequences.columns.items():
        axis = sequences.axes[name]
        columns[name] = np.concatenate([column[a:b] for a, b in parts[axis]])
        if (of := sequences.points.get(name)) is not None:
            columns[name] = columns[name] + (axes[of].lengths.cumsum() - axes[of].lengths).repeat(axes[axis].lengths)
    per_row = axes[TARGETS].lengths
    valid = (np.ones(len(rows), np.bool_) if counted is None else counted).repeat(per_row)
    own = {name: torch.from_numpy(columns.pop(name)) for name in _OF_TARGETS}
    targets = Targets(**own, users=torch.from_numpy(users.repeat(per_row)), counted=torch.from_numpy(valid))
    return Batch(
        targets=targets,
        inputs={name: torch.from_numpy(column) for name, column in columns.items()},
        axes=axes,
        tokens=int(axes[sequences.counts].lengths.sum()),
        impressions=int(valid.sum()),
        costs={name: int(cost[rows].sum()) for name, cost in sequences.costs.items()},
    )
