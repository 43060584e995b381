"""Attention by chunks in blocks of queries, each with just the keys that some query of it may see: linear in the history.

For CPUs. Blocks have one shape, with rows and keys that are not used, so that many are computed at once, and so that no number
of a row depends on what comes behind it, not even by the order of a sum.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from ctrsink.attention.chunked import Chunked, ChunkedInputs, Keys
from ctrsink.attention.chunked_products import Asked, Blocks, ChunkedProducts
from ctrsink.attention.inputs import register
from ctrsink.attention.kinds import PREFIX
from ctrsink.attention.packed import Packed
from ctrsink.config.model import SparseSinksSpec
from ctrsink.features.ragged import ranges

BACKEND = "ctrsink_chunked_blocks"
QUERIES = 32  # of a block at most, as measured: more would share keys that few of them see
AT_ONCE = 256  # queries, as measured: their scores stay in the cache
_NEVER = 2**62
_Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Keys of n blocks and the rows from which to which each is seen, [n, k]."""


@dataclass(kw_only=True)
class ChunkedBlockInputs(ChunkedInputs):
    """The blocks of a batch, made once per forward pass."""

    blocks: list[Blocks]


def inputs(packed: Packed, chunked: Chunked, sparse: SparseSinksSpec) -> ChunkedBlockInputs:
    """The inputs of a batch, with the rule of `ctrsink.attention.chunked`."""
    spans = block_spans(packed, chunked, sparse.chunks)
    blocks = [
        _blocks(packed, chunked, sparse, part)
        for depth in np.unique(spans[:, 3])
        for part in _stretches(spans[spans[:, 3] == depth])
    ]
    return ChunkedBlockInputs(packed=packed, window=None, chunked=chunked, blocks=blocks)


def block_spans(packed: Packed, chunked: Chunked, chunks: int) -> np.ndarray:
    """The blocks of all sequences, int64 [n, 4]: sequence, first row, the row behind its last, and depth.

    A block holds whole events, or a piece of a longer one; depth says how many blocks before it that event fills. At most
    `chunks` - 1 finished chunks live where a block begins, and it ends before more than `chunks` + 1 more are born, so that
    blocks have one shape whatever the gaps are. Where one begins depends on nothing behind it.
    """
    starts, depths = _pieces(packed)
    bounds, of_chunks = (axis.offsets.tolist() for axis in (packed.sequences, chunked.axes["chunks"]))
    born, until = chunked.finished.since.numpy(), chunked.finished.until.numpy()
    out: list[tuple[int, ...]] = []
    for sequence, (begin, end) in enumerate(pairwise(bounds)):
        own = slice(*np.searchsorted(starts, (begin, end)).tolist())
        stops, deep = np.append(starts[own], end), depths[own]
        births, deaths = (of[of_chunks[sequence] : of_chunks[sequence + 1]] for of in (born, until))
        piece = 0
        while piece < len(deep):
            first = int(stops[piece])
            known = int(np.searchsorted(births, first, "right"))
            room = known + 2 * chunks - int((deaths[:known] > first).sum())
            last = min(first + QUERIES, int(births[room]) if room < len(births) else end)
            following = int(np.searchsorted(stops, last, "right")) - 1
            out.append((sequence, first, int(stops[following]), int(deep[piece])))
            piece = following
    return np.array(out, np.int64).reshape(-1, 4)


def _pieces(packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """Where events, and pieces of those longer than a block, begin; and how many pieces of its event lie before each."""
    events, owner = packed.events.numpy(), packed.sequences.owner.numpy()
    begins = np.flatnonzero(np.append(True, (np.diff(events) != 0) | (np.diff(owner) != 0)))
    pieces = -(-np.diff(begins, append=len(events)) // QUERIES)
    depths = ranges(np.zeros_like(pieces), pieces)
    starts = begins.repeat(pieces) + depths * QUERIES
    # The prefix is seen by all: it takes no place among a block's own events.
    return starts, np.where(packed.kinds.numpy()[starts] == PREFIX, 0, depths)


def _stretches(spans: np.ndarray) -> Iterator[np.ndarray]:
    """Some blocks at once."""
    step = max(1, AT_ONCE // QUERIES)
    for first in range(0, len(spans), step):
        yield spans[first : first + step]


def _blocks(packed: Packed, chunked: Chunked, sparse: SparseSinksSpec, spans: np.ndarray) -> Blocks:
    """Rows and keys of some blocks of one depth: prefix, latest sinks before, own events, ends of chunks, means."""
    first, stop, finished = spans[:, 1], spans[:, 2], 2 * sparse.chunks
    rows = first[:, None] + np.arange(QUERIES)
    parts = [
        _prefix(packed, chunked, spans),
        _latest(packed, chunked, min(sparse.window, packed.sinks.axis.longest), spans),
        _own(packed, chunked, spans),
        _alive(chunked.ends, chunked.axes["ends"].offsets.numpy(), finished * sparse.transition, spans),
        _alive(chunked.finished, chunked.axes["chunks"].offsets.numpy(), finished, spans),
        _running(packed, chunked, rows, spans),
    ]
    keys, since, until = (np.concatenate(of, 1) for of in zip(*parts, strict=True))
    hidden = (rows[:, :, None] < since[:, None]) | (rows[:, :, None] >= until[:, None])
    rows = np.where(rows < stop[:, None], rows, len(packed.kinds))
    tables = (torch.from_numpy(of) for of in (rows, keys, hidden))
    return Blocks(*tables, means=finished + QUERIES, asked=_asked(packed, rows, keys))


def _taken(keys: Keys, chosen: np.ndarray, exist: np.ndarray) -> _Part:
    """Those keys, int64 [n, k], where they `exist`."""
    if not len(keys.rows):
        return np.zeros_like(chosen), np.full_like(chosen, _NEVER), np.zeros_like(chosen)
    chosen = np.where(exist, chosen, 0)
    rows, since, until = (of.numpy()[chosen] for of in (keys.rows, keys.since, keys.until))
    return rows, np.where(exist, since, _NEVER), until


def _prefix(packed: Packed, chunked: Chunked, spans: np.ndarray) -> _Part:
    """The prefix of each block's sequence, as long as the longest."""
    bounds = packed.sequences.offsets.numpy()
    lengths = np.add.reduceat(packed.kinds.numpy() == PREFIX, bounds[:-1], dtype=np.int64)
    place = np.arange(lengths.max())
    return _taken(chunked.positions, bounds[spans[:, 0], None] + place, place < lengths[spans[:, 0], None])


def _latest(packed: Packed, chunked: Chunked, window: int, spans: np.ndarray) -> _Part:
    """The latest sinks before each block."""
    sinks, offsets = packed.sinks.positions.numpy(), packed.sinks.axis.offsets.numpy()
    number = np.searchsorted(sinks, spans[:, 1])[:, None] + np.arange(-window, 0)
    exist = number >= offsets[spans[:, 0], None]
    return _taken(chunked.positions, sinks[np.where(exist, number, 0)] if len(sinks) else number, exist)


def _own(packed: Packed, chunked: Chunked, spans: np.ndarray) -> _Part:
    """The events of a block, from where the first of them begins."""
    depth = int(spans[0, 3])
    place = spans[:, 1, None] + np.arange(-depth * QUERIES, QUERIES)
    exist = place < spans[:, 2, None]
    exist &= packed.kinds.numpy()[np.where(exist, place, 0)] != PREFIX
    return _taken(chunked.positions, place, exist)


def _alive(keys: Keys, offsets: np.ndarray, most: int, spans: np.ndarray) -> _Part:
    """Those of the keys, `most` at most, that some row of a block sees, in the order in which they are first seen."""
    since, until = keys.since.numpy(), keys.until.numpy()
    chosen = np.full((len(spans), most), -1)
    for block, (sequence, first, stop, _) in enumerate(spans.tolist()):
        own = slice(offsets[sequence], offsets[sequence + 1])
        found = np.flatnonzero((since[own] < stop) & (until[own] > first))
        chosen[block, : len(found)] = own.start + found
    return _taken(keys, chosen, chosen >= 0)


def _running(packed: Packed, chunked: Chunked, rows: np.ndarray, spans: np.ndarray) -> _Part:
    """For each row a key that it alone sees: the mean of the chunk that its latest behaviour is in."""
    latest = np.searchsorted(packed.sinks.positions.numpy(), rows) - 1
    keys, since, _ = _taken(chunked.running, latest, latest >= packed.sinks.axis.offsets.numpy()[spans[:, 0], None])
    return keys, np.where(since < _NEVER, rows, _NEVER), rows + 1


def _asked(packed: Packed, rows: np.ndarray, keys: np.ndarray) -> Asked:
    """Which of the rows are asked, and which of their keys are sinks."""
    asked, sinks = (
        _slots(packed, of.positions, of.axis.place, rows_of) for of, rows_of in ((packed.asked, rows), (packed.sinks, keys))
    )
    blocks, places = np.nonzero(asked >= 0)
    slots = asked[blocks, places]
    owner = packed.sequences.owner.numpy()
    tables = (blocks, places, owner[rows[blocks, places]], slots, sinks[blocks])
    return Asked(*(torch.from_numpy(of) for of in tables))


def _slots(packed: Packed, positions: torch.Tensor, place: torch.Tensor, rows: np.ndarray) -> np.ndarray:
    """Which slot of its sequence each row is, -1: none."""
    slots = np.full(len(packed.kinds) + 1, -1)
    slots[positions.numpy()] = place.numpy()
    return slots[np.minimum(rows, len(packed.kinds))]


def _attend(
    given: ChunkedBlockInputs,
    layer: int,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """See inputs.register."""
    # Rotary embedding in fp32 leaves query and key wider than value under autocast.
    asks, shown, values = (of[0].transpose(0, 1).to(value.dtype) for of in (query, key, value))
    shown, values = given.chunked.with_means(shown), given.chunked.with_means(values)
    at_asked, at_means = given.at_asked.get(layer), given.at_means.get(layer)
    return ChunkedProducts.apply(asks, shown, values, at_asked, at_means, kwargs["scaling"], given.blocks)[None]


register(BACKEND, ChunkedBlockInputs, _attend)
