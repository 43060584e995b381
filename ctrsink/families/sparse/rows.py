"""What the loader does for this family beside the columns that all families of ids have: chunks, and blocks of positions.

The rows of a sequence are its behaviours and its targets in the order of what they see: a behaviour sees those before it, a
target the first `seen`. Rows that follow one another see nearly the same, so they are computed in blocks.
"""

import numpy as np

from ctrsink.dataset.layout import Layout
from ctrsink.features.ragged import ranges
from ctrsink.sequences.behaviours import BEHAVIOURS
from ctrsink.sequences.chunks import Chunks, by_length, by_time
from ctrsink.sequences.columns import TARGETS, Sequences

ROWS, CHUNKS, BLOCKS = "rows", "chunks", "blocks"
QUERIES = 16
"""Rows of a block at most, as measured: more would share keys that few of them see."""


def with_chunks(given: Sequences, layout: Layout) -> Sequences:
    """The sequences with what their attention reads.

    Of behaviours and targets: `behaviour_rows`, `target_rows`, where each lies among the rows. Of rows: `row_seen`, how many
    behaviours it sees, `row_running`, the first behaviour of the chunk that these end in, `row_times`, local seconds. Of chunks:
    `chunk_starts`, `chunk_ends`, rows of behaviours, `chunk_born`, `chunk_died`, see Chunks. Of blocks: `block_first`, a row,
    `block_counts`, and `block_chunks` [N, 2 |P|], numbers of the chunks that some row of it has, -1 for none. All int64.
    """
    columns = dict(given.columns)
    counts, targets = np.diff(given.bounds[BEHAVIOURS]), np.diff(given.bounds[TARGETS])
    number = np.arange(len(given))
    owner = np.concatenate([number.repeat(counts), number.repeat(targets)])
    seen = np.concatenate([ranges(np.zeros_like(counts), counts), columns["seen"]])
    times = np.concatenate([columns["behaviour_times"], columns["times"]]) + round(layout.utc_offset_hours * 3600)
    order = np.lexsort((seen, owner))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    place -= given.bounds[ROWS][owner]
    columns["behaviour_rows"], columns["target_rows"] = place[: counts.sum()], place[counts.sum() :]
    columns["row_seen"], columns["row_times"] = seen[order], times[order]

    found: list[Chunks] = []
    running: list[np.ndarray] = []
    blocks: list[np.ndarray] = []
    for i in range(len(given)):
        own = slice(*given.bounds[BEHAVIOURS][i : i + 2])
        of_rows = columns["row_seen"][slice(*given.bounds[ROWS][i : i + 2])]
        if layout.chunking == "time":
            chunks = by_time(columns["behaviour_times"][own], layout.chunks)
        else:
            chunks = by_length(own.stop - own.start, layout.chunks)
        found.append(chunks)
        running.append(chunks.running[of_rows])
        blocks.append(blocks_of(of_rows, chunks, layout.chunks))
    columns["row_running"] = np.concatenate(running)
    for name in ("starts", "ends", "born", "died"):
        columns[f"chunk_{name}"] = np.concatenate([getattr(chunks, name) for chunks in found])
    table = np.concatenate(blocks)
    columns["block_first"], columns["block_counts"], columns["block_chunks"] = table[:, 0], table[:, 1], table[:, 2:]
    bounds = {CHUNKS: [len(chunks.born) for chunks in found], BLOCKS: [len(block) for block in blocks]}
    axes = {
        name: {"behaviour": BEHAVIOURS, "target": TARGETS, "row": ROWS, "chunk": CHUNKS, "block": BLOCKS}[name.partition("_")[0]]
        for name in columns.keys() - given.columns.keys()
    }
    points = {"behaviour_rows": ROWS, "target_rows": ROWS, "block_first": ROWS}
    return Sequences(
        columns,
        given.axes | axes,
        given.bounds | {name: np.append(0, np.cumsum(lengths)) for name, lengths in bounds.items()},
        given.counts,
        given.points | points | {"chunk_starts": BEHAVIOURS, "chunk_ends": BEHAVIOURS},
        given.costs,
    )


def blocks_of(seen: np.ndarray, chunks: Chunks, most: int) -> np.ndarray:
    """Blocks of the rows of one sequence: their first row, how many, and numbers of chunks, int64 [N, 2 + 2 `most`].

    At most `most` - 1 chunks live where a block begins, and it ends before more than `most` + 1 more are born, so that all blocks
    have one shape, whatever the gaps are. Where a block ends depends on nothing behind it.

    Args:
        seen: int64 [R], ascending.
        most: chunks of a row, the running one among them.
    """
    out, first = [], 0
    while first < len(seen):
        known = int(np.searchsorted(chunks.born, seen[first], "right"))
        stop = min(first + QUERIES, len(seen))
        if known + most + 1 < len(chunks.born):
            stop = min(stop, int(np.searchsorted(seen, chunks.born[known + most + 1])))
        lives = np.flatnonzero((chunks.born <= seen[stop - 1]) & (chunks.died > seen[first]))
        row = np.full(2 + 2 * most, -1)
        row[:2] = first, stop - first
        row[2 : 2 + len(lives)] = lives
        out.append(row)
        first = stop
    return np.stack(out)
