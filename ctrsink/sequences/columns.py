"""Sequences that are not padded, one after another in their columns."""

from dataclasses import dataclass, fields
from typing import TypedDict

import numpy as np


class OfAsked(TypedDict):
    """Columns of a Sequence with a row for each event that is asked."""

    asked_times: np.ndarray
    asked_signals: np.ndarray
    asked_numbers: np.ndarray


class OfSinks(TypedDict):
    """Columns of a Sequence with a row per sink, and the similarity of those asked and sinks."""

    sink_positions: np.ndarray
    signals: np.ndarray
    sink_numbers: np.ndarray
    sink_times: np.ndarray
    similarity: np.ndarray


@dataclass(frozen=True)
class Sequence:
    """One sequence of l positions, k sinks, t targets and m events that are asked, not padded."""

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
    readout_numbers: np.ndarray
    base: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    """Numbers of the target events in the chronology."""
    asked_positions: np.ndarray
    asked_times: np.ndarray
    asked_signals: np.ndarray
    asked_numbers: np.ndarray
    similarity: np.ndarray
    """float32 [m * k], of each event asked and each sink; or empty."""


_POSITIONS = ("input_ids", "kinds", "event_ids", "aligned", "candidate", "position_ids")
_SINKS = ("sink_positions", "signals", "sink_numbers", "sink_times")
_TARGETS = ("readout_positions", "readout_numbers", "base", "labels", "targets")
_ASKED = ("asked_positions", "asked_times", "asked_signals", "asked_numbers")


@dataclass(frozen=True)
class Sequences:
    """N sequences: the columns of all, one after another, and the bounds [N + 1] of each in its positions, sinks and so on."""

    columns: Sequence
    positions: np.ndarray
    sinks: np.ndarray
    targets: np.ndarray
    asked: np.ndarray

    @property
    def pairs(self) -> np.ndarray:
        """Bounds of each sequence in `similarity`, [N + 1]."""
        counts = np.diff(self.sinks) * np.diff(self.asked) * bool(len(self.columns.similarity))
        return np.append(0, counts.cumsum())

    def __getitem__(self, number: int) -> Sequence:
        bounds = dict.fromkeys(_POSITIONS, self.positions)
        bounds |= (
            dict.fromkeys(_SINKS, self.sinks)
            | dict.fromkeys(_TARGETS, self.targets)
            | {"similarity": self.pairs}
            | dict.fromkeys(_ASKED, self.asked)
        )
        parts = {name: getattr(self.columns, name)[of[number] : of[number + 1]] for name, of in bounds.items()}
        return Sequence(**parts)

    @classmethod
    def of(cls, sequences: list[Sequence]) -> "Sequences":
        columns = [np.concatenate([getattr(s, column.name) for s in sequences]) for column in fields(Sequence)]
        sizes = [[len(of) for of in (s.input_ids, s.sink_positions, s.targets, s.asked_positions)] for s in sequences]
        return cls(Sequence(*columns), *np.cumsum([[0, 0, 0, 0], *sizes], axis=0).T)
