"""A piece of a chronology becomes one sequence: `prefix  text1 feedback1 sink1 ... textn` (CTR-Sink; DTI, arXiv 2503.01001).

Many sequences are built at once, by arrays over all their events: a loop over them would take most of the time.
"""

from collections.abc import Callable

import numpy as np

from ctrsink.dataset.events import Events, UserEvents
from ctrsink.dataset.layout import Layout
from ctrsink.features.buckets import signal_ids
from ctrsink.features.columns import in_table
from ctrsink.features.ragged import Ragged, ranges
from ctrsink.features.registry import signal
from ctrsink.features.similarity import cosines
from ctrsink.sequences.batch import FEEDBACK, PREFIX, SINK, TEXT
from ctrsink.sequences.columns import OfAsked, OfSinks, Sequence, Sequences
from ctrsink.sequences.windows import Cuts, Windows, windows_of


def build_sequence(
    chronology: UserEvents,
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
    w, targets = windows_of(cuts, layout), cuts.targets
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
    counts = targets.offsets[1:] - targets.offsets[:-1]
    owner = np.arange(len(slots)).repeat(counts)
    # The slot of each target: its place in the chronology, or among the candidates behind the history.
    asked = firsts[owner] + targets.values - w.starts[owner] + 1
    candidates = w.together.repeat(counts)
    asked[candidates] = ranges((ends - tails)[w.together], tails[w.together])
    bare = _bare(firsts, asked[targets.offsets[:-1]], len(event), layout)
    text_lengths, text_ids, feedback_rows = _contents(w, bare[event])
    spoken = (behaviour & ~bare)[event]
    parts = np.zeros((len(event), 3), np.int64)
    parts[firsts, 0] = len(prefix)
    parts[event, 0] = text_lengths
    parts[behaviour & ~bare, 1] = feedbacks.lengths(feedback_rows[spoken])
    parts[behaviour, 2] = int(layout.sinks)
    names = np.empty(parts.shape, np.uint8)
    names[:] = (TEXT, FEEDBACK, SINK)
    names[firsts, 0] = PREFIX
    kinds = names.ravel().repeat(parts.ravel())
    ids = np.zeros(len(kinds), np.int64)
    ids[kinds == TEXT] = text_ids
    ids[kinds == FEEDBACK] = feedbacks.take(feedback_rows[spoken])
    if len(prefix):
        ids[kinds == PREFIX] = np.tile(prefix, len(slots))
    slot_lengths = parts[:, 0] + parts[:, 1] + parts[:, 2]  # numpy's sum over rows this short is slow
    slot_ends = slot_lengths.cumsum()
    positions = np.append(0, slot_ends[lasts])
    slot_ends -= positions[:-1].repeat(slots)  # counted from the start of the sequence
    numbers = ranges(np.zeros_like(slots), slots).astype(np.int32)
    # Targets that share a history all begin at the position behind it.
    slot_starts = slot_ends - slot_lengths
    behind = np.where(tail, slot_starts - slot_starts[ends - tails].repeat(slots), 0)
    position_ids = ranges(np.zeros_like(positions[1:]), np.diff(positions)) - behind.repeat(slot_lengths)
    asks = tail
    if layout.examples == "per_user":
        # Each event from the first target on is a target before it is a behaviour.
        begin = np.maximum(firsts + 1, asked[targets.offsets[:-1]] - layout.asked_history)
        asks = event & (np.arange(len(event)) >= begin.repeat(slots))
    ask_rows = _asked_rows(w, asks, firsts)
    columns = Sequence(
        input_ids=ids,
        kinds=kinds,
        event_ids=numbers.repeat(slot_lengths),
        # A per_user event is a target and then a behaviour with the same states: the rule for targets holds for all of them.
        aligned=kinds == TEXT if layout.examples == "per_user" else tail.repeat(slot_lengths),
        candidate=tail.repeat(slot_lengths),
        position_ids=position_ids,
        readout_positions=slot_ends[asked] - parts[asked, 1:].sum(1) - 1,
        labels=cuts.of_targets(lambda events, rows: events.labels[rows]),
        targets=targets.values - cuts.begins[owner],
        readout_numbers=cuts.of_targets(_target_numbers),
        base=cuts.of_targets(lambda events, rows: np.zeros(len(rows), np.float32) if events.base is None else events.base[rows]),
        asked_positions=slot_ends[asks] - parts[asks, 1] - parts[asks, 2] - 1,
        **_asked(w, layout, ask_rows),
        **_sinks(w, layout, slot_ends[behaviour] - 1, ask_rows),
    )
    sinks = sizes - tails if layout.sinks else np.zeros_like(slots)
    return Sequences(columns, positions, np.append(0, sinks.cumsum()), targets.offsets, ask_rows.offsets)


def _asked_rows(w: Windows, asks: np.ndarray, firsts: np.ndarray) -> Ragged:
    """Rows of the events that are asked, by sequence; `asks` bool [slots], `firsts` first slot of each sequence."""
    event = np.ones(len(asks), np.bool_)
    event[firsts] = False
    rows = np.concatenate([rows for _, rows in w.chosen()])
    return Ragged(rows[asks[event]], np.append(0, np.add.reduceat(asks, firsts, dtype=np.int64).cumsum()))


def _asked(w: Windows, layout: Layout, rows: Ragged) -> OfAsked:
    """The columns that have a row for each event that is asked."""
    each = list(w.cuts.each(rows.values, rows.offsets[1:]))
    categories = [
        np.concatenate([_category(name, layout.target_rows)(events, own) for events, own in each])
        for name in layout.target_signals
    ]
    return {
        "asked_times": np.concatenate([events.timestamps[own] for events, own in each]),
        "asked_signals": _stacked(categories, len(rows.values)),
        "asked_numbers": np.concatenate([_target_numbers(events, own) for events, own in each]),
    }


def _bare(firsts: np.ndarray, asked: np.ndarray, slots: int, layout: Layout) -> np.ndarray:
    """bool [slots]; behaviours that are their sink alone: older than the latest `text_history` before the first target.

    Args:
        firsts, asked: first slot, and slot of the first target, of each sequence.
    """
    out = np.zeros(slots, np.bool_)
    if layout.text_history is not None:
        out[ranges(firsts + 1, np.maximum(0, asked - firsts - 1 - layout.text_history))] = True
    return out


def _category(name: str, rows: int) -> Callable[[Events, np.ndarray], np.ndarray]:
    """The row of its table of embeddings, of `rows` where it is hashed, that each event has in the category."""
    if signal(name).hashed:
        return lambda events, own: in_table(events.categories[name][own], rows)
    return lambda events, own: events.categories[name][own]


def _target_numbers(events: Events, rows: np.ndarray) -> np.ndarray:
    return np.zeros((len(rows), 0), np.float32) if events.target_numbers is None else events.target_numbers[rows]


def _sink_numbers(events: Events, rows: np.ndarray) -> np.ndarray:
    return np.zeros((len(rows), 0), np.float32) if events.numbers is None else events.numbers[rows]


def _stacked(columns: list[np.ndarray], rows: int) -> np.ndarray:
    return np.stack(columns, axis=1).astype(np.int64) if columns else np.zeros((rows, 0), np.int64)


def _sinks(w: Windows, layout: Layout, positions: np.ndarray, asked: Ragged) -> OfSinks:
    """The columns that have a row per sink, and the similarity of those asked and sinks."""
    if not layout.sinks:
        empty = np.zeros((0, 0), np.int64)
        none = np.empty(0, np.int64)
        return {
            "sink_positions": none,
            "signals": empty,
            "sink_numbers": empty.astype(np.float32),
            "sink_times": none,
            "similarity": np.empty(0, np.float32),
        }
    behaviours = w.behaviour_rows()
    ends = behaviours.offsets[1:]

    def of_sinks(column: Callable[[Events, np.ndarray], np.ndarray]) -> np.ndarray:
        return np.concatenate([column(events, rows) for events, rows in w.cuts.each(behaviours.values, ends)])

    placed = [name for name in layout.signals if signal(name).kind == "bucket"]
    buckets = iter(_buckets(w, layout, tuple(placed)).T) if placed else iter(())
    columns = [next(buckets) if name in placed else of_sinks(_category(name, layout.rows)) for name in layout.signals]
    return {
        "sink_positions": positions,
        "signals": _stacked(columns, len(positions)),
        "sink_numbers": of_sinks(_sink_numbers),
        "sink_times": of_sinks(lambda events, rows: events.timestamps[rows]),
        "similarity": _similarity(w, layout, asked, behaviours),
    }


def _similarity(w: Windows, layout: Layout, asks: Ragged, behaviours: Ragged) -> np.ndarray:
    """Of each event asked and each sink of its sequence, float32 [sum of m * k], 0 where it is not known then; or empty."""
    if layout.similarity is None:
        return np.empty(0, np.float32)
    owner = np.arange(len(w.counts)).repeat(np.diff(asks.offsets))
    sinks = behaviours.lengths(owner)
    ends = sinks.cumsum()[asks.offsets[1:] - 1]
    asked = asks.values.repeat(sinks)
    seen = behaviours.values[ranges(behaviours.offsets[owner], sinks)]
    out = np.zeros(len(asked), np.float32)
    stop = 0
    for (events, own_asked), (_, own_seen) in zip(w.cuts.each(asked, ends), w.cuts.each(seen, ends), strict=True):
        start, stop = stop, stop + len(own_asked)
        before = np.flatnonzero(own_seen < own_asked)
        if layout.similarity == "vectors":
            assert events.vectors is not None
            found = cosines(events.vectors, events.texts[own_asked[before]], events.texts[own_seen[before]])
            out[start + before] = np.nan_to_num(found, nan=0.0)
        else:
            assert events.histories is not None
            found, values = events.histories.similar(own_asked[before], own_seen[before])
            out[start + before[found]] = values
    return out


def _contents(windows: Windows, bare: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all events kept: lengths of their texts (0 where `bare`), the texts' tokens, rows of the feedback table."""
    lengths, ids, feedbacks = [], [], []
    stop = 0
    for events, rows in windows.chosen():
        start, stop = stop, stop + len(rows)
        texts = events.texts[rows]
        length = events.tokens.lengths(texts)
        length[bare[start:stop]] = 0
        lengths.append(length)
        ids.append(events.tokens.values[ranges(events.tokens.offsets[texts], length)])
        feedbacks.append(events.feedbacks[rows])
    return np.concatenate(lengths), np.concatenate(ids), np.concatenate(feedbacks)


def _buckets(windows: Windows, layout: Layout, names: tuple[str, ...]) -> np.ndarray:
    """Bucket signals of all behaviours kept, [N, S].

    One event more is read before the window, so that the oldest behaviour knows the gap before it.

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
    return signal_ids(names, times, layout.buckets, lengths, similar)[wanted]
