"""The arithmetic of blockwise attention, forward and backward: matrix products whose scores live for one block only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Slots:
    """Which sinks or asked of a sequence a block holds, and where."""

    numbers: torch.Tensor
    """int64 [n]; their slots in the batch."""
    places: torch.Tensor
    """int64 [n]; among the block's queries, or among its keys."""


@dataclass(frozen=True)
class Block:
    """Some queries of one sequence, and the keys that they see."""

    sequence: int
    rows: slice
    """The queries, in the packed row."""
    keys: tuple[slice, ...]
    """In the packed row: one part, or the prefix and what a window leaves."""
    hidden: torch.Tensor
    """bool [Q, M] of Q queries and M keys."""
    sinks: Slots
    """Among the queries."""
    seen_sinks: Slots
    """Among the keys."""
    asked: Slots
    """Among the queries."""


class BlockProducts(torch.autograd.Function):
    """softmax(q k^T * scale + biases) v, block by block; the backward pass makes the weights of a block again.

    Weights are held in the precision of the products, as in transformers' eager attention; their softmax is taken in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        table: torch.Tensor | None,
        at_asked: torch.Tensor | None,
        scale: float,
        blocks: Sequence[Block],
    ) -> torch.Tensor:
        """Query [H, N, d], key and value [G, N, d], inter-sink bias [B, K, K], bias of those asked [B, H, M, K] -> [N, H, d]."""
        (heads, length, width), groups = query.shape, len(key)
        out = value.new_empty(length, heads, value.shape[2])
        for block in blocks:
            weights = _weights(block, query, key, table, at_asked, scale)
            seen = torch.bmm(weights, _take(value, block.keys))
            out[block.rows] = seen.view(heads, -1, value.shape[2]).transpose(0, 1)
        ctx.save_for_backward(query, key, value, table, at_asked)
        ctx.scale, ctx.blocks, ctx.shape = scale, blocks, (heads, groups, width)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, table, at_asked = ctx.saved_tensors
        of_out, (heads, groups, width), scale = gradients[0].to(value.dtype), ctx.shape, ctx.scale
        of_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        # Keys and values add up over blocks, the biases over heads: in fp32 at least.
        wide = torch.promote_types(value.dtype, torch.float32)
        of_key, of_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        of_table = torch.zeros_like(table, dtype=wide) if ctx.needs_input_grad[3] else None
        of_asked = torch.zeros_like(at_asked, dtype=wide) if ctx.needs_input_grad[4] else None
        for block in ctx.blocks:
            weights = _weights(block, query, key, table, at_asked, scale)
            asked = _grouped(query[:, block.rows], groups)
            above = _grouped(of_out[block.rows].transpose(0, 1), groups)
            _give(of_value, block.keys, torch.bmm(weights.transpose(1, 2), above))
            of_weights = torch.bmm(above, _take(value, block.keys).transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_query[:, block.rows] = torch.bmm(of_scores, _take(key, block.keys)).mul_(scale).view(heads, -1, width)
            _give(of_key, block.keys, torch.bmm(of_scores.transpose(1, 2), asked).mul_(scale))
            by_head = of_scores.view(heads, -1, of_scores.shape[2])
            sees, shown = block.seen_sinks.numbers, block.seen_sinks.places
            if of_table is not None and len(block.sinks.numbers):
                pairs = by_head[:, block.sinks.places[:, None], shown]
                of_table[block.sequence, block.sinks.numbers[:, None], sees] = pairs.to(wide).sum(0)
            if of_asked is not None and len(block.asked.numbers):
                pairs = by_head[:, block.asked.places[:, None], shown]
                of_asked[block.sequence, :, block.asked.numbers[:, None], sees] = pairs.to(wide)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), of_table, of_asked, None, None


def _weights(
    block: Block,
    query: torch.Tensor,
    key: torch.Tensor,
    table: torch.Tensor | None,
    at_asked: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """softmax(q k^T * scale + biases) of a block, [G, H / G * Q, M]."""
    heads, groups = len(query), len(key)
    mask = torch.zeros(block.hidden.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    sees, shown = block.seen_sinks.numbers, block.seen_sinks.places
    if table is not None and len(block.sinks.numbers):
        mask[block.sinks.places[:, None], shown] = table[block.sequence, block.sinks.numbers[:, None], sees].to(mask.dtype)
    mask.masked_fill_(block.hidden, float("-inf"))
    if at_asked is not None and len(block.asked.numbers):
        mask = mask.repeat(heads, 1, 1)
        rows = block.asked.places[:, None]
        mask[:, rows, shown] += at_asked[block.sequence, :, block.asked.numbers[:, None], sees].to(mask.dtype)
        mask = mask.view(groups, -1, mask.shape[2])
    else:
        mask = mask.repeat(heads // groups, 1)
    asked, shown_keys = _grouped(query[:, block.rows], groups), _take(key, block.keys)
    scores = torch.baddbmm(mask.to(query.dtype), asked, shown_keys.transpose(1, 2), alpha=scale)
    return scores.softmax(-1)


def _grouped(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """[H, Q, d] -> [G, H / G * Q, d]: the heads that share a key ask together."""
    return rows.reshape(groups, -1, rows.shape[2])


def _take(of: torch.Tensor, keys: tuple[slice, ...]) -> torch.Tensor:
    return of[:, keys[0]] if len(keys) == 1 else torch.cat([of[:, part] for part in keys], 1)


def _give(to: torch.Tensor, keys: tuple[slice, ...], values: torch.Tensor) -> None:
    before = 0
    for part in keys:
        size = part.stop - part.start
        to[:, part] += values[:, before : before + size]
        before += size
