"""A piece of a chronology becomes one sequence: `prefix  text1 feedback1 sink1 ... textn` (CTR-Sink; DTI, arXiv 2503.01001).

Many sequences are built at once, by arrays over all their events: a loop over them would take most of the time.
"""

import numpy as np

from ctrsink.attention.kinds import FEEDBACK, PREFIX, SINK, TEXT
from ctrsink.dataset.layout import Layout
from ctrsink.families.decoder.chunked import with_chunks
from ctrsink.families.decoder.pairs import similarity_pairs, visible_pairs
from ctrsink.families.facts import Wording
from ctrsink.features.ragged import Ragged, ranges
from ctrsink.sequences import told
from ctrsink.sequences.columns import TARGETS, Sequences
from ctrsink.sequences.windows import Cuts, Windows, windows_of


def encode(cuts: Cuts, layout: Layout, wording: Wording) -> Sequences:
    """The sequences in their order, each behind `layout.history` behaviours at most.

    A target's readout is the last token of its text, so it knows neither its own feedback nor anything later. The last event
    has no feedback and no sink: nothing comes after it.

    Columns of positions: `input_ids` (0 at a sink), `kinds`, `event_ids`, `aligned`, `candidate` (see attention.Packed) and
    `position_ids`: targets that share a history begin at the same position behind it. Of sinks: `sink_positions`, `signals`,
    `sink_numbers`, `sink_times`. Of targets: `readout_positions`, `readout_numbers`, `base`. Of events that are asked, which are
    targets, and in `per_user` sequences every event from the first target on: `asked_positions`, `asked_times`, `asked_signals`,
    `asked_numbers`. Of each pair of one asked and a sink: `similarity`. With chunks also those of `chunked.with_chunks`.

    Raises:
        InputError: a `per_user` sequence would show an impression the answers of its own request.
    """
    feedbacks, prefix = wording.feedbacks, wording.prefix
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
    asked_rows = _asked_rows(w, asks, firsts)
    behaviours = w.behaviour_rows() if layout.sinks else Ragged(np.empty(0, np.int64), np.zeros(len(slots) + 1, np.int64))
    event_ids, candidate = numbers.repeat(slot_lengths), tail.repeat(slot_lengths)
    # A per_user event is a target and then a behaviour with the same states: the rule for targets holds for all of them.
    aligned = kinds == TEXT if layout.examples == "per_user" else candidate
    similarity, pairs = similarity_pairs(cuts, layout, asked_rows, behaviours)

    def times(rows: Ragged) -> np.ndarray:
        return told.of_rows(cuts, rows, lambda events, own: events.timestamps[own])

    of = {
        "positions": {
            "input_ids": ids, "kinds": kinds, "event_ids": event_ids, "aligned": aligned, "candidate": candidate,
            "position_ids": position_ids,
        },
        "sinks": {
            "sink_positions": slot_ends[behaviour] - 1 if layout.sinks else np.empty(0, np.int64),
            "signals": told.behaviour_signals(w, layout, behaviours),
            "sink_numbers": told.of_rows(cuts, behaviours, told.behaviour_numbers),
            "sink_times": times(behaviours),
        },
        TARGETS: {
            "readout_positions": slot_ends[asked] - parts[asked, 1:].sum(1) - 1,
            "readout_numbers": cuts.of_targets(told.target_numbers),
            "base": cuts.of_targets(told.base_scores),
            "labels": cuts.of_targets(lambda events, rows: events.labels[rows]).astype(np.float32),
            "events": targets.values - cuts.begins[owner],
            "times": cuts.of_targets(lambda events, rows: events.timestamps[rows]),
        },
        "asked": {
            "asked_positions": slot_ends[asks] - parts[asks, 1] - parts[asks, 2] - 1,
            "asked_times": times(asked_rows),
            "asked_signals": told.target_signals(cuts, layout, asked_rows),
            "asked_numbers": told.of_rows(cuts, asked_rows, told.target_numbers),
        },
        "pairs": {"similarity": similarity},
    }  # fmt: skip
    counted = {"positions": positions, "sinks": behaviours.offsets, TARGETS: targets.offsets, "asked": asked_rows.offsets}
    found = Sequences(
        {name: column for columns in of.values() for name, column in columns.items()},
        {name: axis for axis, columns in of.items() for name in columns},
        counted
        | {"pairs": pairs}
        | _most(positions, position_ids, aligned, candidate, tails, np.diff(asked_rows.offsets), sizes),
        counts="positions",
        points={f"{name}_positions": "positions" for name in ("sink", "readout", "asked")},
        costs=visible_pairs(kinds, event_ids, aligned, candidate, positions, layout.window),
    )
    return with_chunks(found, layout) if layout.chunks else found


def _most(
    positions: np.ndarray,
    position_ids: np.ndarray,
    aligned: np.ndarray,
    candidate: np.ndarray,
    tails: np.ndarray,
    asked: np.ndarray,
    sizes: np.ndarray,
) -> dict[str, np.ndarray]:
    """Bounds of what has no columns, for its number in a sequence alone; see attention.Packed.most."""
    of_aligned, of_candidates = (np.add.reduceat(of, positions[:-1], dtype=np.int64) for of in (aligned, candidate))
    several = tails > 1
    candidates = np.where(several, of_candidates, 0)
    # Every candidate is asked at its last position.
    rows = {"aligned": of_aligned, "candidates": candidates, "asked_rows": asked + candidates - np.where(several, tails, 0)}
    rows |= {"places": sizes - tails + 1, "span": np.maximum.reduceat(position_ids, positions[:-1]) + 1}
    return {name: np.append(0, of.cumsum()) for name, of in rows.items()}


def _asked_rows(w: Windows, asks: np.ndarray, firsts: np.ndarray) -> Ragged:
    """Rows of the events that are asked, by sequence; `asks` bool [slots], `firsts` first slot of each sequence."""
    event = np.ones(len(asks), np.bool_)
    event[firsts] = False
    rows = np.concatenate([rows for _, rows in w.chosen()])
    return Ragged(rows[asks[event]], np.append(0, np.add.reduceat(asks, firsts, dtype=np.int64).cumsum()))


def _bare(firsts: np.ndarray, asked: np.ndarray, slots: int, layout: Layout) -> np.ndarray:
    """bool [slots]; behaviours that are their sink alone: older than the latest `text_history` before the first target.

    Args:
        firsts, asked: first slot, and slot of the first target, of each sequence.
    """
    out = np.zeros(slots, np.bool_)
    if layout.text_history is not None:
        out[ranges(firsts + 1, np.maximum(0, asked - firsts - 1 - layout.text_history))] = True
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
