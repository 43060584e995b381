"""FlexAttention on the packed row: one kernel that reads who sees whom and the compact biases; nothing is made [N, N]."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ctrsink.attention.inputs import AttentionInputs, register
from ctrsink.attention.packed import Packed, Slots
from ctrsink.attention.rule_packed import Sees, Sight
from ctrsink.attention.table_gradient import Pairs, with_table_gradient

BACKEND = "ctrsink_flex"
_ScoreMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Symbolic sizes from the first call on: every batch has its own. A whole graph, because what could not be compiled would run
# unfused, over all [N, N] scores, without a word.
_compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True, fullgraph=True)


@dataclass(kw_only=True)
class FlexInputs(AttentionInputs):
    """What the kernel reads, made once per forward pass; indices are those of the packed row of N tokens."""

    sees: Sees
    blocks: BlockMask
    slot: torch.Tensor
    """int32 [N]; which sink of its sequence a token is, -1: none."""
    sink_row: torch.Tensor
    """int32 [N]; where the row of a sink begins in the flattened tables [B, K, K], counted from 1; -1: no sink."""
    asked_row: torch.Tensor
    """int32 [N]; where the row of one asked begins in one head's bias of those asked [B, M, K], counted from 1; -1: not asked."""
    sinks: Pairs
    asked: Pairs


def inputs(packed: Packed, sinks_only: bool, window: int | None = None) -> FlexInputs:
    """The inputs of a batch, with the rule of `ctrsink.attention.rule_dense.visible`."""
    sight = Sight.of(packed, sinks_only, window)
    sees = sight.rule()
    sinks, asked = packed.sinks, packed.asked
    slot, ask = _numbers(packed, sinks), _numbers(packed, asked)
    return FlexInputs(
        packed=packed,
        window=window,
        sees=sees,
        blocks=sight.block_mask(sees),
        slot=slot,
        sink_row=torch.where(slot >= 0, (sight.sequence * sinks.width + slot) * sinks.width + 1, -1),
        asked_row=torch.where(ask >= 0, (sight.sequence * asked.width + ask) * sinks.width + 1, -1),
        sinks=Pairs.of(sinks.padded, sinks.valid, sinks.padded, sinks.valid, sees),
        asked=Pairs.of(asked.padded, asked.valid, sinks.padded, sinks.valid, sees),
    )


def _numbers(packed: Packed, slots: Slots) -> torch.Tensor:
    """Which slot of its sequence each position is, int32 [N]; -1: none."""
    empty = torch.full(packed.kinds.shape, -1, dtype=torch.int32, device=packed.kinds.device)
    return empty.index_copy(0, slots.positions, slots.axis.place.int())


def _attend(
    given: FlexInputs, layer: int, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """See inputs.register."""
    if kwargs.get("dropout"):
        raise ValueError("the flex backend has no dropout of attention weights: set attention_dropout to 0")
    # Rotary embedding in fp32 leaves query and key wider than value under autocast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    table, at_asked = given.tables.pop(layer, None), given.at_asked.get(layer)
    kernel: Callable[..., Any] = _compiled if query.is_cuda else flex_attention
    scale = kwargs["scaling"]
    out, aux = kernel(
        query,
        key,
        value,
        score_mod=_score_mod(given, table, at_asked),
        block_mask=given.blocks,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if table is not None:
        out = with_table_gradient(out, table[:, None], query, key, value, aux.lse, given.sinks, scale)
    if at_asked is not None:
        out = with_table_gradient(out, at_asked, query, key, value, aux.lse, given.asked, scale)
    return out.transpose(1, 2)


def _score_mod(given: FlexInputs, table: torch.Tensor | None, at_asked: torch.Tensor | None) -> _ScoreMod | None:
    """Adds the entry of each pair of tokens; the 0 that pairs without one read is put before the entries.

    The kernel gets values without gradient: its own would be an atomic addition per score, nearly all to that 0.
    """
    slot, sink_row, asked_row = given.slot, given.sink_row, given.asked_row
    of_sinks = None if table is None else nn.functional.pad(table.detach().flatten(), (1, 0))
    # A row per head: a number of heads in the closure would be one more thing to compile for.
    of_asked = None if at_asked is None else nn.functional.pad(at_asked.detach().transpose(0, 1).flatten(1), (1, 0))

    def add_table(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        assert of_sinks is not None
        return score + of_sinks[torch.where((sink_row[q] >= 0) & (slot[k] >= 0), sink_row[q] + slot[k], 0)]

    def add_asked(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        assert of_asked is not None
        return score + of_asked[h, torch.where((asked_row[q] >= 0) & (slot[k] >= 0), asked_row[q] + slot[k], 0)]

    def add_both(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return add_asked(add_table(score, b, h, q, k), b, h, q, k)

    if of_sinks is not None and of_asked is not None:
        return add_both
    return add_table if of_sinks is not None else add_asked if of_asked is not None else None


register(BACKEND, FlexInputs, _attend)
