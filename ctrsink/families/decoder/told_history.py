"""What a decoder was given of a history, to be compared: states that were computed of equal inputs are equal."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ctrsink.sequences.columns import Sequences

_POSITIONS = ("input_ids", "kinds", "event_ids", "aligned", "position_ids")
_SINKS = ("sink_positions", "signals", "sink_numbers", "sink_times")
_ASKED = ("asked_positions", "asked_times", "asked_signals", "asked_numbers")


@dataclass(frozen=True)
class ToldHistory:
    """Everything that states of the history's P positions depend on, as `encode` gave it."""

    positions: dict[str, np.ndarray]
    """[P, ...] each."""
    sinks: dict[str, np.ndarray]
    """[K, ...] each."""
    asked: dict[str, np.ndarray]
    """[m, ...] each; of events of the history that are asked."""
    similarity: np.ndarray
    """float32 [m, K] of these, or empty."""

    @classmethod
    def of(cls, sequence: Sequences) -> "ToldHistory":
        """Of one sequence; its candidates come last."""
        columns = sequence.columns
        count = len(columns["candidate"]) - int(columns["candidate"].sum())
        asked = int(np.searchsorted(columns["asked_positions"], count))
        similarity = columns["similarity"]
        sinks = len(columns["sink_positions"])
        if len(similarity):
            similarity = similarity.reshape(-1, sinks)[:asked]
        return cls(
            {name: columns[name][:count].copy() for name in _POSITIONS},
            {name: columns[name].copy() for name in _SINKS},
            {name: columns[name][:asked].copy() for name in _ASKED},
            similarity.copy(),
        )

    @property
    def length(self) -> int:
        """P."""
        return len(self.positions["input_ids"])

    @cached_property
    def nbytes(self) -> int:
        columns = (*self.positions.values(), *self.sinks.values(), *self.asked.values(), self.similarity)
        return sum(of.nbytes for of in columns)

    def sinks_before(self, position: int) -> int:
        """How many sinks lie before it."""
        return int(np.searchsorted(self.sinks["sink_positions"], position))

    def shared(self, other: "ToldHistory") -> int:
        """The positions from the start on whose states are the same, because a position knows of none that comes later."""
        found = min(_alike(self.positions[name], other.positions[name]) for name in _POSITIONS)
        for ours, theirs, at in (
            (self.sinks, other.sinks, "sink_positions"),
            (self.asked, other.asked, "asked_positions"),
        ):
            same = min(_alike(ours[name], theirs[name]) for name in ours)
            found = min([found, *(int(of[at][same]) for of in (ours, theirs) if same < len(of[at]))])
        return min(found, self._similar(other))

    def _similar(self, other: "ToldHistory") -> int:
        """As `shared`, as far as similarities to earlier sinks go."""
        if not (self.similarity.size and other.similarity.size):
            return self.length
        rows, sinks = (min(pair) for pair in zip(self.similarity.shape, other.similarity.shape, strict=True))
        differ = self.similarity[:rows, :sinks] != other.similarity[:rows, :sinks]
        at = self.asked["asked_positions"][:rows]
        differ &= self.sinks["sink_positions"][None, :sinks] < at[:, None]
        wrong = np.flatnonzero(differ.any(1))
        return int(at[wrong[0]]) if len(wrong) else self.length


def _alike(ours: np.ndarray, theirs: np.ndarray) -> int:
    """How many rows from the first on are equal."""
    count = min(len(ours), len(theirs))
    differ = (ours[:count] != theirs[:count]).any(tuple(range(1, ours.ndim)))
    return int(differ.argmax()) if differ.any() else count
