"""Sequences that are not padded, one after another in their columns."""

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class Sequence:
    """One sequence of l positions, k sinks and t targets, not padded."""

    input_ids: np.ndarray
    kinds: np.ndarray
    event_ids: np.ndarray
    aligned: np.ndarray
    candidate: np.ndarray
    position_ids: np.ndarray
    sink_positions: np.ndarray
    signals: np.ndarray
    sink_numbers: np.ndarray
    sink_times: np.ndarray
    readout_positions: np.ndarray
    readout_times: np.ndarray
    target_signals: np.ndarray
    target_numbers: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    """Numbers of the target events in the chronology."""
    similarity: np.ndarray
    """float32 [t * k], of each target and sink; or empty."""


_POSITIONS = ("input_ids", "kinds", "event_ids", "aligned", "candidate", "position_ids")
_SINKS = ("sink_positions", "signals", "sink_numbers", "sink_times")
_TARGETS = ("readout_positions", "readout_times", "target_signals", "target_numbers", "labels", "targets")


@dataclass(frozen=True)
class Sequences:
    """N sequences: the columns of all, one after another, and the bounds [N + 1] of each in its positions, sinks and targets."""

    columns: Sequence
    positions: np.ndarray
    sinks: np.ndarray
    targets: np.ndarray

    @property
    def pairs(self) -> np.ndarray:
        """Bounds of each sequence in `similarity`, [N + 1]."""
        counts = np.diff(self.sinks) * np.diff(self.targets) * bool(len(self.columns.similarity))
        return np.append(0, counts.cumsum())

    def __getitem__(self, number: int) -> Sequence:
        bounds = dict.fromkeys(_POSITIONS, self.positions)
        bounds |= dict.fromkeys(_SINKS, self.sinks) | dict.fromkeys(_TARGETS, self.targets) | {"similarity": self.pairs}
        parts = {name: getattr(self.columns, name)[of[number] : of[number + 1]] for name, of in bounds.items()}
        return Sequence(**parts)

    @classmethod
    def of(cls, sequences: list[Sequence]) -> "Sequences":
        columns = [np.concatenate([getattr(s, column.name) for s in sequences]) for column in fields(Sequence)]
        sizes = [[len(of) for of in (s.input_ids, s.sink_positions, s.targets)] for s in sequences]
        return cls(Sequence(*columns), *np.cumsum([[0, 0, 0], *sizes], axis=0).T)
