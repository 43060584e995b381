"""FlexAttention on the packed row: one kernel that reads who sees whom and the compact biases; nothing is made [N, N]."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as shapes
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ctrsink.attention.inputs import AttentionInputs, register
from ctrsink.attention.packed import Packed
from ctrsink.attention.rule_packed import BLOCK, Sees, Sight
from ctrsink.attention.table_gradient import Pairs, with_table_gradient

BACKEND = "ctrsink_flex"
ScoreMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Symbolic sizes from the first call on: every batch has its own. A whole graph, because what could not be compiled would run
# unfused, over all [N, N] scores, without a word; and because of that a run ends where torch's limit of graphs is reached. So a
# model has two of them, with and without gradients: whatever its sizes, stages and layers are, nothing else differs.
_compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True, fullgraph=True)


@dataclass(kw_only=True)
class FlexInputs(AttentionInputs):
    """What the kernel reads, made once per forward pass; indices are those of the packed row of L tokens, padding included."""

    sees: Sees
    blocks: BlockMask
    slot: torch.Tensor
    """int32 [L]; which sink of its sequence a token is, -1: none."""
    sink_row: torch.Tensor
    """int32 [L]; where the row of a sink begins in the flattened tables [B, K, K], counted from 1; -1: no sink."""
    asked_row: torch.Tensor
    """int32 [L]; where the row of one asked begins in one head's bias of those asked [B, M, K], counted from 1; -1: not asked."""
    no_rows: tuple[torch.Tensor, torch.Tensor]
    """int32 [L] each; -1: what a layer without a bias reads in their place."""
    sinks: Pairs
    asked: Pairs

    @property
    def length(self) -> int:
        """Whole blocks, two at least: torch has other kernels for what is shorter, or fills no block."""
        return whole_blocks(self.packed.sequences.total)


def whole_blocks(count: int) -> int:
    """The least number of whole blocks' tokens, two blocks at least, that holds so many."""
    return max(2 * BLOCK, count + -count % BLOCK)


def inputs(packed: Packed, sinks_only: bool, window: int | None = None) -> FlexInputs:
    """The inputs of a batch, with the rule of `ctrsink.attention.rule_dense.visible`."""
    sight = Sight.of(packed, sinks_only, window).padded(whole_blocks(packed.sequences.total))
    sees = sight.rule()
    sinks, asked = packed.sinks, packed.asked
    none = torch.full_like(sight.sequence, -1)
    slot, ask = (none.index_copy(0, of.positions, of.axis.place.int()) for of in (sinks, asked))
    return FlexInputs(
        packed=packed,
        window=window,
        sees=sees,
        blocks=sight.block_mask(sees),
        slot=slot,
        sink_row=torch.where(slot >= 0, (sight.sequence * sinks.width + slot) * sinks.width + 1, -1),
        asked_row=torch.where(ask >= 0, (sight.sequence * asked.width + ask) * sinks.width + 1, -1),
        no_rows=(none, none.clone()),
        sinks=Pairs.of(sinks.padded, sinks.valid, sinks.padded, sinks.valid, sees),
        asked=Pairs.of(asked.padded, asked.valid, sinks.padded, sinks.valid, sees),
    )


def _attend(
    given: FlexInputs, layer: int, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """See inputs.register."""
    # Rotary embedding in fp32 leaves query and key wider than value under autocast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    table, at_asked = given.tables.pop(layer, None), given.at_asked.get(layer)
    scale = kwargs["scaling"]
    at_sinks, asks = None, None
    if table is not None:
        at_sinks = given.sink_row, table.flatten()
    if at_asked is not None:
        asks = given.asked_row, at_asked.transpose(0, 1).flatten(1)
    out, lse = kernel(query, key, value, added(given.slot, given.no_rows, query.shape[1], at_sinks, asks), given.blocks, scale)
    if table is not None:
        out, lse = with_table_gradient(out, lse, table[:, None], query, key, value, given.sinks, scale)
    if at_asked is not None:
        out, lse = with_table_gradient(out, lse, at_asked, query, key, value, given.asked, scale)
    return out.transpose(1, 2)


def kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score_mod: ScoreMod, blocks: BlockMask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention in one of its two graphs.

    Query [1, H, L, d], key and value [1, H_kv, C, d] -> output [1, H, L, d] and lse [1, H, L], the logarithm of the sum of each
    row's exponentials.
    """
    compute: Callable[..., Any] = _compiled if query.is_cuda else flex_attention
    trains = torch.is_grad_enabled() and any(of.requires_grad for of in (query, key, value))
    if trains:
        query, key, value = _Together.apply(query, key, value)  # pyright: ignore[reportGeneralTypeIssues, reportAssignmentType]
    # Sizes that happen to be equal in the first batch would be held to be equal in every one.
    with torch.set_grad_enabled(trains), shapes.patch(use_duck_shape=False):  # pyright: ignore[reportAttributeAccessIssue]
        out, aux = compute(
            query,
            key,
            value,
            score_mod=score_mod,
            block_mask=blocks,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    return out, aux.lse


class _Together(torch.autograd.Function):
    """Tensors of which one has a gradient, as tensors that all have: which ones do depends on what a stage trains."""

    @staticmethod
    def forward(ctx: Any, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(of.view_as(of) for of in given)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grads


Entries = tuple[torch.Tensor, torch.Tensor]
"""Where the row of each query begins among entries, int32 [L], from 1, or -1: it has none; and the entries, [n] or [H, n]."""


def added(
    slot: torch.Tensor, no_rows: tuple[torch.Tensor, torch.Tensor], heads: int, at_sinks: Entries | None, at_asked: Entries | None
) -> ScoreMod:
    """Adds the entries of each query and key; the 0 that pairs without one read is put before the entries.

    One function for all layers: one without a bias finds that 0 for every pair. The kernel gets values without gradient: its own
    would be an atomic addition per score, nearly all to that 0.

    Args:
        slot: int32 [C]; which sink of its sequence a key is, -1: none.
        no_rows: int32 [L] each, -1; two, because one tensor in two places would be another graph.
        at_sinks: of all heads alike.
        at_asked: of each head.
    """
    sink_row, of_sinks = no_rows[0], slot.new_zeros(2, dtype=torch.float32)
    if at_sinks is not None:
        sink_row, of_sinks = at_sinks[0], functional.pad(at_sinks[1].detach(), (1, 0)).float()
    # A row per head: a number of heads in the closure would be one more thing to compile for.
    asked_row, of_asked = no_rows[1], slot.new_zeros(heads, 2, dtype=torch.float32)
    if at_asked is not None:
        asked_row, of_asked = at_asked[0], functional.pad(at_asked[1].detach(), (1, 0)).float()

    def add(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        sink = torch.where((sink_row[q] >= 0) & (slot[k] >= 0), sink_row[q] + slot[k], 0)
        asked = torch.where((asked_row[q] >= 0) & (slot[k] >= 0), asked_row[q] + slot[k], 0)
        return score + of_sinks[sink] + of_asked[h, asked]

    return add


register(BACKEND, FlexInputs, _attend)
