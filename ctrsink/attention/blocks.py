"""Attention on the packed row in blocks of queries: matrix products over just the keys that some query of a block sees.

For CPUs. torch's own kernel reaches a fraction there of what matrix products do in bfloat16, computes padding, and needs a mask
[B, L, L] for a window. Here no padding takes part, a window makes the cost linear in the length, and biases are written into
the mask of a block, so that no row is computed twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ctrsink.attention.block_products import Block, BlockProducts, Slots
from ctrsink.attention.inputs import AttentionInputs, layer_index
from ctrsink.attention.packing import Packing
from ctrsink.attention.rule_dense import several_candidates, visible
from ctrsink.sequences.batch import PAD, PREFIX, Batch

BACKEND = "ctrsink_blocks"
QUERIES = 128  # of a block, as measured: its scores stay in the cache


@dataclass(kw_only=True)
class BlockInputs(AttentionInputs):
    """The blocks of a batch, made once per forward pass."""

    blocks: Sequence[Block]


def inputs(batch: Batch, sinks_only: bool, window: int | None = None) -> BlockInputs:
    """The inputs of a batch, with the rule of `ctrsink.attention.rule_dense.visible`."""
    packing = Packing.of(batch)
    plain = not sinks_only and window is None and not several_candidates(batch)
    blocks, start = [], 0
    for sequence, length in enumerate((batch.kinds != PAD).sum(1).tolist()):
        one = Batch(**{f.name: getattr(batch, f.name)[sequence : sequence + 1] for f in fields(batch)})
        for first in range(0, length, QUERIES):
            rows = slice(first, min(first + QUERIES, length))
            if plain:
                keys, hidden = (slice(0, rows.stop),), _later(rows.stop - first, rows.stop)
            else:
                keys, hidden = _sight(one, rows, sinks_only, window)
            sinks, asked = (one.sink_positions, one.sink_valid), (one.asked_positions, one.asked_valid)
            blocks.append(
                Block(
                    sequence=sequence,
                    rows=_moved(rows, start),
                    keys=tuple(_moved(part, start) for part in keys),
                    hidden=hidden.to(batch.kinds.device),
                    sinks=_slots(*sinks, (rows,)),
                    seen_sinks=_slots(*sinks, keys),
                    asked=_slots(*asked, (rows,)),
                )
            )
        start += length
    return BlockInputs(
        packing=packing,
        sink_valid=batch.sink_valid,
        packed_sinks=packing.find(batch.sink_positions),
        window=window,
        blocks=blocks,
    )


@lru_cache(maxsize=64)
def _later(queries: int, keys: int) -> torch.Tensor:
    """bool [queries, keys], plain causal order, of the last queries among as many keys."""
    return torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)


def _sight(one: Batch, rows: slice, sinks_only: bool, window: int | None) -> tuple[tuple[slice, ...], torch.Tensor]:
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


def _slots(positions: torch.Tensor, valid: torch.Tensor, parts: Sequence[slice]) -> Slots:
    """Those of [1, n] slots that lie in the parts of their sequence."""
    numbers, places, before = [], [], 0
    for part in parts:
        found = ((positions >= part.start) & (positions < part.stop) & valid)[0].nonzero()[:, 0]
        numbers.append(found)
        places.append(positions[0, found] - part.start + before)
        before += part.stop - part.start
    return Slots(torch.cat(numbers), torch.cat(places))


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    attention_inputs: AttentionInputs | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Packed query [1, H, N, d], key and value [1, H_kv, N, d] -> output [1, N, H, d]."""
    given = attention_inputs
    if not isinstance(given, BlockInputs):  # CTRModel finds that this layer did not follow the inputs
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0], None
    if kwargs.get("dropout"):
        raise ValueError("the blocks backend has no dropout of attention weights: set attention_dropout to 0")
    layer = layer_index(module)
    given.followed.add(layer)
    if given.watch is not None:
        given.watch(given, layer, query, key, kwargs["scaling"])
    # Rotary embedding in fp32 leaves query and key wider than value under autocast.
    query, key = query[0].to(value.dtype), key[0].to(value.dtype)
    out = BlockProducts.apply(
        query, key, value[0], given.tables.pop(layer, None), given.at_asked.get(layer), kwargs["scaling"], given.blocks
    )
    return out[None], None


AttentionInterface.register(BACKEND, _attention)
