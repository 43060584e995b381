"""Rows of different length in one array."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """Rows of different length: row i is `values[offsets[i] : offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: list[np.ndarray] | tuple[tuple[int, ...], ...]) -> "Ragged":
        offsets = np.cumsum([0, *(len(r) for r in rows)])
        return cls(np.concatenate([np.asarray(r, np.int64) for r in rows]) if rows else np.empty(0, np.int64), offsets)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return self.offsets[rows + 1] - self.offsets[rows]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows one after another, [sum of their lengths]."""
        return self.values[ranges(self.offsets[rows], self.lengths(rows))]


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The integers `starts[i] .. starts[i] + lengths[i] - 1` of one range after another, int64 [sum of lengths]."""
    ends = lengths.cumsum()
    out = np.arange(ends[-1] if len(ends) else 0)
    out += (starts - ends + lengths).repeat(lengths)
    return out
