"""A piece of a chronology becomes one sequence: `prefix  text1 feedback1 sink1 ... textn` (CTR-Sink; DTI, arXiv 2503.01001)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ctrsink.batch import FEEDBACK, PREFIX, SINK, TEXT
from ctrsink.config.data import DataSpec, Signal
from ctrsink.config.model import SinkSpec
from ctrsink.data.signals import signal_ids
from ctrsink.errors import InputError


@dataclass(frozen=True)
class Layout:
    """How sequences are built; it belongs to the trained model as much as its weights do."""

    examples: Literal["per_target", "per_user"]
    history: int
    targets: int
    signals: tuple[Signal, ...] = ()
    """Empty: no sinks."""
    buckets: int = 1

    @classmethod
    def of(cls, data: DataSpec, sinks: SinkSpec | None) -> "Layout":
        if sinks is None:
            return cls(data.examples, data.history, data.targets_per_sequence)
        return cls(data.examples, data.history, data.targets_per_sequence, sinks.signals, sinks.buckets)


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
        lengths = self.lengths(rows)
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return self.values[np.repeat(self.offsets[rows], lengths) + within]


@dataclass(frozen=True)
class Chronology:
    """Events of one user, oldest first; `texts` and `feedbacks` are rows of the two token tables."""

    texts: np.ndarray
    """int64 [N]."""
    feedbacks: np.ndarray
    """int64 [N]."""
    timestamps: np.ndarray
    """int64 [N], seconds."""
    labels: np.ndarray
    """int8 [N]; 0, 1, or -1 where the event is no impression."""
    known: np.ndarray | None = None
    """int64 [N]; how many events were known when this one was asked: those before its request. None: all before it."""

    def piece(self, lo: int, hi: int, number: int, targets: int) -> np.ndarray:
        """Events that are the targets of piece `number` of the events [lo, hi): the impressions there, `targets` to a piece."""
        impressions = lo + np.flatnonzero(self.labels[lo:hi] >= 0)
        return impressions[number * targets : (number + 1) * targets]


@dataclass(frozen=True)
class Sequence:
    """One sequence of l positions, k sinks and t targets, not padded."""

    input_ids: np.ndarray
    kinds: np.ndarray
    event_ids: np.ndarray
    aligned: np.ndarray
    sink_positions: np.ndarray
    signals: np.ndarray
    readout_positions: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    """Numbers of the target events in the chronology."""


def build_sequence(
    chronology: Chronology, targets: np.ndarray, layout: Layout, texts: Ragged, feedbacks: Ragged, prefix: np.ndarray
) -> Sequence:
    """The sequence of `targets` (numbers of events, ascending), behind `layout.history` behaviours at most.

    A target's readout is the last token of its text, so it knows neither its own feedback nor anything later. The last event
    has no feedback and no sink: nothing comes after it.

    Raises:
        InputError: a `per_user` sequence would show an impression the answers of its own request.
    """
    past, last = int(targets[0]), int(targets[-1])
    if chronology.known is not None and (chronology.known[targets] < targets).any():
        if len(targets) > 1 or layout.examples == "per_user":
            raise InputError(
                "impressions of one request share a history, which per_user sequences cannot keep apart: "
                "use data.examples per_target, or prepare the log without its request column"
            )
        past = int(chronology.known[last])
    # One target: what was known when its request was made, then the target. Several: everything from the first to the last.
    start = max(0, past - layout.history)
    events = np.append(np.arange(start, last if len(targets) > 1 else past), last)
    count, sinks = len(events), int(bool(layout.signals))
    text_rows, feedback_rows = chronology.texts[events], chronology.feedbacks[events]
    # Three parts per event: text, feedback, sink.
    parts = np.stack([texts.lengths(text_rows), feedbacks.lengths(feedback_rows), np.full(count, sinks)], axis=1)
    parts[-1, 1:] = 0
    kinds = np.repeat(np.tile(np.array([TEXT, FEEDBACK, SINK], np.uint8), count), parts.ravel())
    event_ids = np.repeat(np.arange(1, count + 1, dtype=np.int32), parts.sum(1))
    ids = np.zeros(len(kinds), np.int64)
    ids[kinds == TEXT] = texts.take(text_rows)
    ids[kinds == FEEDBACK] = feedbacks.take(feedback_rows[:-1])
    kinds = np.concatenate([np.full(len(prefix), PREFIX, np.uint8), kinds])
    event_ids = np.concatenate([np.zeros(len(prefix), np.int32), event_ids])
    # A per_user event is a target and then a behaviour with the same states, so the rule for targets holds for all of them.
    aligned = kinds == TEXT
    if layout.examples == "per_target":
        aligned &= event_ids == count
    ends = len(prefix) + np.cumsum(parts.sum(1)) - parts.sum(1) + parts[:, 0] - 1
    # Signals are taken from the whole past, so the oldest behaviour of the window knows the gap before it.
    signals = np.empty((0, 0), np.int64)
    if layout.signals:
        whole = np.append(np.arange(start), events)
        signals = signal_ids(layout.signals, chronology.timestamps[whole], layout.buckets)[start:-1]
    return Sequence(
        input_ids=np.concatenate([prefix, ids]),
        kinds=kinds,
        event_ids=event_ids,
        aligned=aligned,
        sink_positions=np.flatnonzero(kinds == SINK),
        signals=signals,
        readout_positions=ends[np.searchsorted(events, targets)],
        labels=chronology.labels[targets],
        targets=targets,
    )
