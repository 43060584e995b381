"""Sequences that are not padded, one behind another in their columns."""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

TARGETS = "targets"
"""The axis of what is predicted; its columns `labels`, `events` and `times` become the Targets of a batch."""


@dataclass(frozen=True)
class Sequences:
    """N sequences: the columns of all, and the bounds of each sequence on every axis."""

    columns: dict[str, np.ndarray]
    axes: dict[str, str]
    """Of each column, the axis whose rows it has."""
    bounds: dict[str, np.ndarray]
    """Of each axis int64 [N + 1]; where the rows of each sequence begin and, at last, end."""
    counts: str
    """The axis whose rows the cost of a sequence is counted in."""
    points: dict[str, str] = field(default_factory=dict)
    """Columns that hold numbers of rows on an axis, counted within their sequence."""
    costs: dict[str, np.ndarray] = field(default_factory=dict)
    """What else each sequence costs, int64 [N]."""

    padded: bool = False
    """Whether the model pads the sequences of a batch to one length, so that each costs as much as the longest."""

    def __len__(self) -> int:
        return len(self.bounds[TARGETS]) - 1

    @property
    def lengths(self) -> np.ndarray:
        """What each sequence costs, int64 [N]."""
        return np.diff(self.bounds[self.counts])

    def __getitem__(self, number: int) -> "Sequences":
        """One of them, alone."""
        spans = {name: slice(*bounds[number : number + 2].tolist()) for name, bounds in self.bounds.items()}
        return Sequences(
            {name: column[spans[self.axes[name]]] for name, column in self.columns.items()},
            self.axes,
            {name: np.array([0, span.stop - span.start]) for name, span in spans.items()},
            self.counts,
            self.points,
            {name: cost[number : number + 1] for name, cost in self.costs.items()},
            self.padded,
        )

    @classmethod
    def joined(cls, parts: "list[Sequences]") -> "Sequences":
        """The sequences of all parts, which have the same columns."""
        first = parts[0]
        lengths = {name: np.concatenate([np.diff(part.bounds[name]) for part in parts]) for name in first.bounds}
        return cls(
            {name: np.concatenate([part.columns[name] for part in parts]) for name in first.columns},
            first.axes,
            {name: np.append(0, of.cumsum()) for name, of in lengths.items()},
            first.counts,
            first.points,
            {name: np.concatenate([part.costs[name] for part in parts]) for name in first.costs},
            first.padded,
        )


def spans(bounds: np.ndarray, rows: np.ndarray) -> list[tuple[int, int]]:
    """Where the chosen sequences lie; runs of them that follow one another are one span."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return [(int(bounds[rows[a]]), int(bounds[rows[b - 1] + 1])) for a, b in pairwise([0, *breaks.tolist(), len(rows)])]
