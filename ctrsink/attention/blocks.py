"""Attention on the packed row in blocks of queries: matrix products over just the keys that some query of a block sees.

For CPUs. torch's own kernel reaches a fraction there of what matrix products do in bfloat16, computes padding, and needs a mask
[B, L, L] for a window. Here no padding takes part, a window makes the cost linear in the length, and biases are written into
the mask of a block, so that no row is computed twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ctrsink.attention.block_products import Block, BlockProducts, Slots
from ctrsink.attention.inputs import AttentionInputs, register
from ctrsink.attention.kinds import PREFIX
from ctrsink.attention.packed import Packed, Padded
from ctrsink.attention.rule_dense import visible
from ctrsink.sequences.batch import Axis

BACKEND = "ctrsink_blocks"
QUERIES = 128  # of a block, as measured: its scores stay in the cache


@dataclass(kw_only=True)
class BlockInputs(AttentionInputs):
    """The blocks of a batch, made once per forward pass."""

    blocks: Sequence[Block]


def inputs(packed: Packed, sinks_only: bool, window: int | None = None) -> BlockInputs:
    """The inputs of a batch, with the rule of `ctrsink.attention.rule_dense.visible`."""
    plain = not sinks_only and window is None and not packed.most["candidates"]
    blocks, start = [], 0
    for sequence, length in enumerate(packed.sequences.lengths.tolist()):
        one = _alone(packed, sequence)
        for first in range(0, length, QUERIES):
            rows = slice(first, min(first + QUERIES, length))
            if plain:
                keys, hidden = (slice(0, rows.stop),), _later(rows.stop - first, rows.stop)
            else:
                keys, hidden = _sight(one, rows, sinks_only, window)
            blocks.append(
                Block(
                    sequence=sequence,
                    rows=_moved(rows, start),
                    keys=tuple(_moved(part, start) for part in keys),
                    hidden=hidden.to(packed.kinds.device),
                    sinks=_slots(one.sinks, (rows,)),
                    seen_sinks=_slots(one.sinks, keys),
                    asked=_slots(one.asked, (rows,)),
                )
            )
        start += length
    return BlockInputs(packed=packed, window=window, blocks=blocks)


def _alone(packed: Packed, sequence: int) -> Padded:
    """One sequence of the batch, without any padding, [1, L]."""

    def part(axis: Axis) -> slice:
        return slice(*axis.offsets[sequence : sequence + 2].tolist())

    own = part(packed.sequences)
    sinks, asked = ((of.positions[part(of.axis)] - own.start)[None] for of in (packed.sinks, packed.asked))
    return Padded(
        kinds=packed.kinds[own][None],
        events=packed.events[own][None],
        aligned=packed.aligned[own][None],
        candidate=packed.candidate[own][None],
        sinks=sinks,
        sink_valid=torch.ones_like(sinks, dtype=torch.bool),
        asked=asked,
        asked_valid=torch.ones_like(asked, dtype=torch.bool),
        most=packed.most,
    )


@lru_cache(maxsize=64)
def _later(queries: int, keys: int) -> torch.Tensor:
    """bool [queries, keys], plain causal order, of the last queries among as many keys."""
    return torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)


def _sight(one: Padded, rows: slice, sinks_only: bool, window: int | None) -> tuple[tuple[slice, ...], torch.Tensor]:
    """The keys that some of the rows see, without those between the prefix and the oldest, and which of them are hidden."""
    positions = torch.arange(rows.start, rows.stop, device=one.kinds.device)[None]
    hidden = ~visible(one, positions, sinks_only, window)[0, :, : rows.stop]
    prefix = int((one.kinds == PREFIX).sum())
    if rows.start < prefix:
        return (slice(0, rows.stop),), hidden
    oldest = prefix + int((~hidden[:, prefix:]).any(0).int().argmax())
    if oldest == prefix:
        return (slice(0, rows.stop),), hidden
    keys = (slice(0, prefix), slice(oldest, rows.stop))[prefix == 0 :]
    return keys, torch.cat([hidden[:, part] for part in keys], 1)


def _slots(positions: torch.Tensor, parts: Sequence[slice]) -> Slots:
    """Those of [1, n] slots that lie in the parts of their sequence."""
    numbers, places, before = [], [], 0
    for part in parts:
        found = ((positions >= part.start) & (positions < part.stop))[0].nonzero()[:, 0]
        numbers.append(found)
        places.append(positions[0, found] - part.start + before)
        before += part.stop - part.start
    return Slots(torch.cat(numbers), torch.cat(places))


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _attend(
    given: BlockInputs, layer: int, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """See inputs.register."""
    # Rotary embedding in fp32 leaves query and key wider than value under autocast.
    query, key = query[0].to(value.dtype), key[0].to(value.dtype)
    table, at_asked = given.tables.pop(layer, None), given.at_asked.get(layer)
    return BlockProducts.apply(query, key, value[0], table, at_asked, kwargs["scaling"], given.blocks)[None]


register(BACKEND, BlockInputs, _attend)
