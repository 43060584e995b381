"""What each position of a text sequence sees where its history is read by chunks (`model.sparse`): keys, and for how long.

A position that sees s behaviours cuts them into chunks itself, see sequences.chunks. From position to position that changes
little, so each key is given once, with the run of positions that see it: text until its event ends, a sink until `window` more
behaviours have come, the last sinks of a chunk and the chunk's mean as long as there is that chunk.
"""

import numpy as np

from ctrsink.attention.kinds import PREFIX
from ctrsink.dataset.layout import Layout
from ctrsink.sequences.chunks import by_time
from ctrsink.sequences.columns import Sequences

_AXES = {"seen": "positions", "running": "sinks", "chunk": "chunks", "end": "ends"}
_POINTS = {"starts": "sinks", "ends": "sinks", "sinks": "sinks", "born": "positions", "until": "positions"}


def with_chunks(given: Sequences, layout: Layout) -> Sequences:
    """The sequences with what their attention reads, int64; a key is seen from one position to, but without, another.

    Of positions: `seen_until`, each from itself on. Of sinks, for the chunk that ends with this one while no behaviour has come
    behind it: `running_starts`, its first sink, and `running_until`. Of finished chunks, by `chunk_born`: `chunk_starts`,
    `chunk_ends`, the first sink and the one after the last, and `chunk_until`. Of the last sinks of these, from where they have
    left the window on, by `end_born`: `end_sinks` and `end_until`. The cost `pairs` is how many keys all positions see.
    """
    found = [_of_one(given[number], layout) for number in range(len(given))]
    columns = {name: np.concatenate([one[name] for one, _ in found]) for name in found[0][0]}
    lengths = {axis: [len(one[name]) for one, _ in found] for axis, name in (("chunks", "chunk_born"), ("ends", "end_born"))}
    return Sequences(
        given.columns | columns,
        given.axes | {name: _AXES[name.partition("_")[0]] for name in columns},
        given.bounds | {axis: np.append(0, np.cumsum(of)) for axis, of in lengths.items()},
        given.counts,
        given.points | {name: _POINTS[name.partition("_")[2]] for name in columns},
        {"pairs": np.array([pairs for _, pairs in found])},
    )


def _of_one(one: Sequences, layout: Layout) -> tuple[dict[str, np.ndarray], int]:
    """Columns of one sequence, and its pairs."""
    assert layout.window is not None  # by the section `sparse`
    kinds, events, sinks = (one.columns[name] for name in ("kinds", "event_ids", "sink_positions"))
    length, count = len(kinds), len(sinks)
    # The first position that sees so many behaviours; of more than there are, the end.
    seeing = np.concatenate([[0], sinks + 1, [length]])
    until = np.searchsorted(events, events, "right")
    until[kinds == PREFIX] = length
    until[sinks] = seeing[np.minimum(np.arange(count) + 1 + layout.window, count + 1)]

    chunks = by_time(one.columns["sink_times"], layout.chunks)
    born, died = seeing[chunks.born], seeing[chunks.died]
    last = chunks.ends[:, None] - np.arange(1, layout.transition + 1)
    exists = last >= chunks.starts[:, None]
    which = np.broadcast_to(np.arange(len(born))[:, None], last.shape)[exists]
    last = last[exists]
    # Within the window a sink is seen anyway.
    since = np.maximum(born[which], until[sinks[last]])
    order = np.argsort(since, kind="stable")
    order = order[since[order] < died[which[order]]]
    columns = {
        "seen_until": until,
        "running_starts": chunks.running[1:],
        "running_until": seeing[2:],
        "chunk_starts": chunks.starts,
        "chunk_ends": chunks.ends,
        "chunk_born": born,
        "chunk_until": died,
        "end_sinks": last[order],
        "end_born": since[order],
        "end_until": died[which[order]],
    }
    seen = (
        (until, np.arange(length)),
        (seeing[2:], seeing[1:-1]),
        (died, born),
        (columns["end_until"], columns["end_born"]),
    )
    return columns, sum(int((stop - start).sum()) for stop, start in seen)
