"""A piece of a chronology becomes one sequence: `prefix  text1 feedback1 sink1 ... textn` (CTR-Sink; DTI, arXiv 2503.01001).

Many sequences are built at once, by arrays over all their events: a loop over them would take most of the time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import numpy as np

from ctrsink.batch import FEEDBACK, PREFIX, SINK, TEXT
from ctrsink.config.data import DataSpec, Signal
from ctrsink.config.model import SinkSpec
from ctrsink.data.signals import signal_ids
from ctrsink.data.similarity import cosines, most_similar
from ctrsink.errors import InputError


@dataclass(frozen=True)
class Layout:
    """How sequences are built; it belongs to the trained model as much as its weights do."""

    examples: Literal["per_target", "per_request", "per_user"]
    history: int
    targets: int
    signals: tuple[Signal, ...] = ()
    """Empty: no sinks."""
    buckets: int = 1
    retrieve: int | None = None
    """`per_target`: of the history only this many behaviours, those most similar to the target."""

    @classmethod
    def of(cls, data: DataSpec, sinks: SinkSpec | None) -> "Layout":
        if sinks is None:
            return cls(data.examples, data.history, data.targets_per_sequence, retrieve=data.retrieve)
        return cls(data.examples, data.history, data.targets_per_sequence, sinks.signals, sinks.buckets, data.retrieve)

    @property
    def needs_vectors(self) -> bool:
        """Whether sequences depend on the vectors of the items."""
        return "similarity" in self.signals or self.retrieve is not None


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


@dataclass(frozen=True)
class Events:
    """Events of any number of chronologies, one after another, oldest first in each; see Chronology for the columns, [N] each."""

    texts: np.ndarray
    feedbacks: np.ndarray
    timestamps: np.ndarray
    labels: np.ndarray
    known: np.ndarray
    tokens: Ragged
    """Token table of the items' texts."""
    vectors: np.ndarray | None = field(default=None, kw_only=True)
    """float16 [rows of `tokens`, width], those of the items; zeros where unknown."""


@dataclass(frozen=True)
class Cuts:
    """Where n sequences are cut: `sizes[i]` of them from `events[i]`, whose rows they name."""

    events: list[Events]
    sizes: np.ndarray
    begins: np.ndarray
    """int64 [n]; row at which each sequence's chronology begins."""
    targets: Ragged
    """Rows of the targets of each sequence, ascending, at least one."""

    def each(self, rows: np.ndarray, ends: np.ndarray) -> Iterator[tuple[Events, np.ndarray]]:
        """The events and those of the `rows` that point there; `ends` [n] says where each sequence's rows end."""
        stops = ends[self.sizes.cumsum() - 1].tolist()
        for events, start, stop in zip(self.events, [0, *stops], stops, strict=False):
            yield events, rows[start:stop]


def split_requests(cuts: Cuts) -> tuple[Cuts, np.ndarray]:
    """Cut each piece of n into its requests: impressions that were shown at one moment behind one history.

    Returns:
        The cuts of m >= n sequences, in the order of the pieces, and int64 [m], which piece each is of.
    """
    rows, ends = cuts.targets.values, cuts.targets.offsets[1:]
    known = np.concatenate([events.known[own] for events, own in cuts.each(rows, ends)])
    times = np.concatenate([events.timestamps[own] for events, own in cuts.each(rows, ends)])
    piece = np.arange(len(ends)).repeat(np.diff(cuts.targets.offsets))
    opens = np.ones(len(rows), np.bool_)
    opens[1:] = (np.diff(known) != 0) | (np.diff(times) != 0) | (np.diff(piece) != 0)
    firsts = np.flatnonzero(opens)
    owner = piece[firsts]
    bounds = np.searchsorted(owner, np.append(0, cuts.sizes.cumsum()))
    return Cuts(cuts.events, np.diff(bounds), cuts.begins[owner], Ragged(rows, np.append(firsts, len(rows)))), owner


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
    sink_times: np.ndarray
    readout_positions: np.ndarray
    readout_times: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    """Numbers of the target events in the chronology."""


@dataclass(frozen=True)
class Sequences:
    """N sequences: the columns of all, one after another, and the bounds [N + 1] of each in its positions, sinks and targets."""

    columns: Sequence
    positions: np.ndarray
    sinks: np.ndarray
    targets: np.ndarray

    def __getitem__(self, number: int) -> Sequence:
        def part(of: np.ndarray, bounds: np.ndarray) -> np.ndarray:
            return of[bounds[number] : bounds[number + 1]]

        c = self.columns
        return Sequence(
            *(part(of, self.positions) for of in (c.input_ids, c.kinds, c.event_ids, c.aligned, c.candidate, c.position_ids)),
            *(part(of, self.sinks) for of in (c.sink_positions, c.signals, c.sink_times)),
            *(part(of, self.targets) for of in (c.readout_positions, c.readout_times, c.labels, c.targets)),
        )

    @classmethod
    def of(cls, sequences: list[Sequence]) -> "Sequences":
        columns = [np.concatenate([getattr(s, column.name) for s in sequences]) for column in fields(Sequence)]
        sizes = [[len(of) for of in (s.input_ids, s.sink_positions, s.targets)] for s in sequences]
        return cls(Sequence(*columns), *np.cumsum([[0, 0, 0], *sizes], axis=0).T)


def build_sequence(
    chronology: Chronology,
    targets: np.ndarray,
    layout: Layout,
    texts: Ragged,
    feedbacks: Ragged,
    prefix: np.ndarray,
    vectors: np.ndarray | None = None,
) -> Sequence:
    """The sequence of `targets` (numbers of events in the chronology, ascending); see build_sequences."""
    c = chronology
    known = np.arange(len(c.texts)) if c.known is None else c.known
    events = Events(c.texts, c.feedbacks, c.timestamps, c.labels, known, texts, vectors=vectors)
    cuts = Cuts([events], np.array([1]), np.array([0]), Ragged.of([targets]))
    return build_sequences(cuts, layout, feedbacks, prefix)[0]


def build_sequences(cuts: Cuts, layout: Layout, feedbacks: Ragged, prefix: np.ndarray) -> Sequences:
    """The sequences in their order, each behind `layout.history` behaviours at most.

    A target's readout is the last token of its text, so it knows neither its own feedback nor anything later. The last event
    has no feedback and no sink: nothing comes after it.

    Raises:
        InputError: a `per_user` sequence would show an impression the answers of its own request.
    """
    w, targets = _windows(cuts, layout), cuts.targets
    # A sequence is a run of slots, the prefix and then its events; a slot has three parts: text, feedback, sink.
    sizes = w.sizes
    slots = sizes + 1
    ends = np.cumsum(slots)
    firsts, lasts = ends - slots, ends - 1
    event = np.ones(ends[-1], np.bool_)
    event[firsts] = False
    # The last slots are targets that do not become behaviours.
    tails = w.tails
    tail = np.zeros_like(event)
    tail[ranges(ends - tails, tails)] = True
    behaviour = event & ~tail
    text_lengths, text_ids, feedback_rows = _contents(w)
    feedback_rows = feedback_rows[behaviour[event]]
    parts = np.zeros((len(event), 3), np.int64)
    parts[firsts, 0] = len(prefix)
    parts[event, 0] = text_lengths
    parts[behaviour, 1] = feedbacks.lengths(feedback_rows)
    parts[behaviour, 2] = int(bool(layout.signals))
    names = np.empty(parts.shape, np.uint8)
    names[:] = (TEXT, FEEDBACK, SINK)
    names[firsts, 0] = PREFIX
    kinds = names.ravel().repeat(parts.ravel())
    ids = np.zeros(len(kinds), np.int64)
    ids[kinds == TEXT] = text_ids
    ids[kinds == FEEDBACK] = feedbacks.take(feedback_rows)
    if len(prefix):
        ids[kinds == PREFIX] = np.tile(prefix, len(slots))
    slot_lengths = parts[:, 0] + parts[:, 1] + parts[:, 2]  # numpy's sum over rows this short is slow
    slot_ends = slot_lengths.cumsum()
    positions = np.append(0, slot_ends[lasts])
    slot_ends -= positions[:-1].repeat(slots)  # counted from the start of the sequence
    numbers = ranges(np.zeros_like(slots), slots).astype(np.int32)
    counts = targets.offsets[1:] - targets.offsets[:-1]
    owner = np.arange(len(slots)).repeat(counts)
    # The slot of each target: its place in the chronology, or among the candidates behind the history.
    asked = firsts[owner] + targets.values - w.starts[owner] + 1
    candidates = w.together.repeat(counts)
    asked[candidates] = ranges((ends - tails)[w.together], tails[w.together])
    # Targets that share a history all begin at the position behind it.
    slot_starts = slot_ends - slot_lengths
    behind = np.where(tail, slot_starts - slot_starts[ends - tails].repeat(slots), 0)
    position_ids = ranges(np.zeros_like(positions[1:]), np.diff(positions)) - behind.repeat(slot_lengths)
    columns = Sequence(
        input_ids=ids,
        kinds=kinds,
        event_ids=numbers.repeat(slot_lengths),
        # A per_user event is a target and then a behaviour with the same states: the rule for targets holds for all of them.
        aligned=kinds == TEXT if layout.examples == "per_user" else tail.repeat(slot_lengths),
        candidate=tail.repeat(slot_lengths),
        position_ids=position_ids,
        sink_positions=slot_ends[behaviour] - 1 if layout.signals else np.empty(0, np.int64),
        signals=_signals(w, layout) if layout.signals else np.empty((0, 0), np.int64),
        sink_times=w.behaviour_times() if layout.signals else np.empty(0, np.int64),
        readout_positions=slot_ends[asked] - parts[asked, 1:].sum(1) - 1,
        readout_times=np.concatenate(
            [events.timestamps[rows] for events, rows in cuts.each(targets.values, targets.offsets[1:])]
        ),
        labels=np.concatenate([events.labels[rows] for events, rows in cuts.each(targets.values, targets.offsets[1:])]),
        targets=targets.values - cuts.begins[owner],
    )
    sinks = sizes - tails if layout.signals else np.zeros_like(slots)
    return Sequences(columns, positions, np.append(0, sinks.cumsum()), targets.offsets)


@dataclass(frozen=True)
class _Windows:
    """Which rows each of n sequences takes: `counts - tails` from `starts` on, then its last `tails` targets; those `kept`."""

    cuts: Cuts
    starts: np.ndarray
    counts: np.ndarray
    together: np.ndarray
    """bool [n]; the targets were shown at one moment: all are tails. Else the last alone is, and the others lie before it."""
    cosines: np.ndarray | None = None
    """[sum of counts], of each row with the last of its sequence; where the layout needs vectors."""
    kept: np.ndarray | None = None
    """bool [sum of counts]; None: all."""

    @property
    def tails(self) -> np.ndarray:
        return np.where(self.together, np.diff(self.cuts.targets.offsets), 1)

    @property
    def sizes(self) -> np.ndarray:
        """Rows that each sequence keeps, its last target among them."""
        return (
            self.counts if self.kept is None else np.add.reduceat(self.kept, self.counts.cumsum() - self.counts, dtype=np.int64)
        )

    def chosen(self) -> Iterator[tuple[Events, np.ndarray]]:
        """The events and those of the rows kept that point there."""
        if self.kept is None:
            return self.each()
        return self.cuts.each(np.concatenate([rows for _, rows in self.each()])[self.kept], self.sizes.cumsum())

    def each(self, lead: np.ndarray | int = 0) -> Iterator[tuple[Events, np.ndarray]]:
        """The events and those of all rows that point there, kept or not, with `lead` more before each sequence's first."""
        counts = self.counts + lead
        ends = counts.cumsum()
        rows = ranges(self.starts - lead, counts)
        rows[ranges(ends - self.tails, self.tails)] = self._tail_rows()
        return self.cuts.each(rows, ends)

    def behaviours(self, lead: np.ndarray, target: bool) -> Iterator[tuple[Events, np.ndarray]]:
        """As `each`, without the tails but, if asked for, the first."""
        counts = self.counts - self.tails + lead + int(target)
        ends = counts.cumsum()
        rows = ranges(self.starts - lead, counts)
        if target:
            rows[ends - 1] = self._tail_rows()[self.tails.cumsum() - self.tails]
        return self.cuts.each(rows, ends)

    def behaviour_times(self) -> np.ndarray:
        """Seconds of all behaviours kept."""
        times = np.concatenate([events.timestamps[rows] for events, rows in self.chosen()])
        wanted = np.ones(len(times), np.bool_)
        wanted[ranges(self.sizes.cumsum() - self.tails, self.tails)] = False
        return times[wanted]

    def _tail_rows(self) -> np.ndarray:
        ends = self.cuts.targets.offsets[1:]
        return self.cuts.targets.values[ranges(ends - self.tails, self.tails)]


def _windows(cuts: Cuts, layout: Layout) -> _Windows:
    rows, offsets = cuts.targets.values, cuts.targets.offsets
    firsts, ends = offsets[:-1], offsets[1:]
    counts = ends - firsts
    known = np.concatenate([events.known[own] for events, own in cuts.each(rows, ends)]) + cuts.begins.repeat(counts)
    together = np.logical_and.reduceat(known == known[firsts].repeat(counts), firsts)
    if (~together.repeat(counts) & (known < rows)).any():
        raise InputError(
            "impressions of one request share a history, which per_user sequences cannot keep apart: "
            "use data.examples per_request or per_target, or prepare the log without its request column"
        )
    # One target: what was known when its request was made, then the target. Several: everything from the first to the last.
    past = known[firsts]
    starts = np.maximum(cuts.begins, past - layout.history)
    windows = _Windows(cuts, starts, np.where(together, past + counts, rows[ends - 1] + 1) - starts, together)
    if not layout.needs_vectors:
        return windows
    similar = _cosines(windows)
    kept = None if layout.retrieve is None else most_similar(similar, windows.counts, layout.retrieve)
    return replace(windows, cosines=similar, kept=kept)


def _cosines(windows: _Windows) -> np.ndarray:
    """Of the items of all rows with that of their sequence's target."""
    targets = windows.cuts.each(windows.cuts.targets.values.repeat(windows.counts), windows.counts.cumsum())
    found = []
    for (events, rows), (_, lasts) in zip(windows.each(), targets, strict=True):
        assert events.vectors is not None
        found.append(cosines(events.vectors, events.texts[rows], events.texts[lasts]))
    return np.concatenate(found)


def _contents(windows: _Windows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all events: lengths of their texts, the texts' tokens, rows of the feedback table."""
    lengths, ids, feedbacks = [], [], []
    for events, rows in windows.chosen():
        texts = events.texts[rows]
        lengths.append(events.tokens.lengths(texts))
        ids.append(events.tokens.values[ranges(events.tokens.offsets[texts], lengths[-1])])
        feedbacks.append(events.feedbacks[rows])
    return np.concatenate(lengths), np.concatenate(ids), np.concatenate(feedbacks)


def _signals(windows: _Windows, layout: Layout) -> np.ndarray:
    """Of all behaviours kept; one event more is read before the window, so that the oldest behaviour knows the gap before it.

    A behaviour that was retrieved has the signals that it has among all of the history.
    """
    lead = (windows.starts > windows.cuts.begins).astype(np.int64)
    lengths = windows.counts - windows.tails + 1 + lead
    times = np.concatenate([events.timestamps[rows] for events, rows in windows.behaviours(lead, target=True)])
    ends = lengths.cumsum()
    wanted = np.ones(len(times), np.bool_)
    wanted[(ends - lengths)[lead > 0]] = False
    similar = None
    if windows.cosines is not None:
        similar = np.full(len(times), np.nan, np.float32)
        similar[wanted] = windows.cosines
    if windows.kept is not None:
        wanted[wanted] = windows.kept
    wanted[ends - 1] = False
    return signal_ids(layout.signals, times, layout.buckets, lengths, similar)[wanted]
