"""The arithmetic of attention by chunks, forward and backward: matrix products whose scores live for some blocks only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional

_HIDDEN = -1e30  # and not infinity: a row that is not used sees nothing


@dataclass(frozen=True)
class Asked:
    """Rows of some blocks that have a bias of their own at sinks, a of them; all int64."""

    blocks: torch.Tensor
    """[a]; which block, and by `places` [a] which row of it."""
    places: torch.Tensor
    sequences: torch.Tensor
    """[a]; which sequence, and by `slots` [a] which of those asked there."""
    slots: torch.Tensor
    sinks: torch.Tensor
    """[a, K]; which sink of the sequence each key is, -1: none."""


@dataclass(frozen=True)
class Blocks:
    """n blocks that are computed at once, each Q rows and the K keys that they share."""

    rows: torch.Tensor
    """int64 [n, Q]; of N positions, and N where a block has fewer."""
    keys: torch.Tensor
    """int64 [n, K]."""
    hidden: torch.Tensor
    """bool [n, Q, K]."""
    means: int
    """So many of the keys, the last ones, are means."""
    asked: Asked


class _Part(NamedTuple):
    """What both passes compute of some blocks; H heads of queries share G of keys."""

    query: torch.Tensor
    """[n * G, H / G * Q, d]; scaled."""
    key: torch.Tensor
    """[n * G, K, d]."""
    value: torch.Tensor
    """[n * G, K, d]."""
    weights: torch.Tensor
    """[n * G, H / G * Q, K]."""


class ChunkedProducts(torch.autograd.Function):
    """softmax(q k^T * scale + biases) v; the backward pass makes the weights of some blocks again.

    Weights are held in the precision of the products, as in block_products; their softmax is taken in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        at_asked: torch.Tensor | None,
        at_means: torch.Tensor | None,
        scale: float,
        blocks: Sequence[Blocks],
    ) -> torch.Tensor:
        """Query [N, H, d], key and value of positions and means [M, G, d], bias of those asked [B, H, A, S] and of means [H] ->
        [N, H, d].
        """
        ctx.save_for_backward(query, key, value, at_asked, at_means)
        ctx.scale, ctx.blocks = scale, blocks
        given = _with_unused(query * scale), key, value, at_asked, at_means
        out = value.new_empty(len(query) + 1, query.shape[1], value.shape[2])
        for part in blocks:
            made = _part(part, *given)
            out[part.rows.flatten()] = _rows(torch.bmm(made.weights, made.value), len(part.rows), query.shape[1])
        return out[:-1]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, at_asked, at_means = ctx.saved_tensors
        heads, groups = query.shape[1], key.shape[1]
        of_out = _with_unused(gradients[0].to(value.dtype))
        given = _with_unused(query * ctx.scale), key, value, at_asked, at_means
        of_query = torch.empty_like(given[0])
        # Keys and values add up over blocks, biases over rows: in fp32 at least.
        wide = torch.promote_types(value.dtype, torch.float32)
        of_key, of_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        of_asked = torch.zeros_like(at_asked, dtype=wide) if ctx.needs_input_grad[3] else None
        of_means = torch.zeros_like(at_means, dtype=wide) if ctx.needs_input_grad[4] else None
        for part in ctx.blocks:
            made, count, keys = _part(part, *given), len(part.rows), part.keys.flatten()
            above = _columns(of_out, part.rows, groups)
            of_scores = torch._softmax_backward_data(torch.bmm(above, made.value.mT), made.weights, -1, made.weights.dtype)
            of_query[part.rows.flatten()] = _rows(torch.bmm(of_scores, made.key).mul_(ctx.scale), count, heads)
            of_key.index_add_(0, keys, _rows(torch.bmm(of_scores.mT, made.query), count, groups).to(wide))
            of_value.index_add_(0, keys, _rows(torch.bmm(made.weights.mT, above), count, groups).to(wide))
            by_head = of_scores.view(count, heads, -1, of_scores.shape[2])
            if of_means is not None:
                of_means += by_head[..., -part.means :].sum((0, 2, 3), dtype=wide)
            if of_asked is not None:
                asked = part.asked
                pairs = by_head[asked.blocks, :, asked.places].mT.masked_fill((asked.sinks < 0)[..., None], 0)
                at = asked.sequences[:, None], asked.slots[:, None], asked.sinks.clamp(min=0)
                of_asked.permute(0, 2, 3, 1).index_put_(at, pairs.to(wide), accumulate=True)
        return of_query[:-1], of_key.to(key.dtype), of_value.to(value.dtype), of_asked, of_means, None, None


def _part(
    of: Blocks,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    at_asked: torch.Tensor | None,
    at_means: torch.Tensor | None,
) -> _Part:
    (count, _, width), groups = of.hidden.shape, key.shape[1]
    asks, shown, values = _columns(query, of.rows, groups), _columns(key, of.keys, groups), _columns(value, of.keys, groups)
    scores = torch.bmm(asks, shown.mT)
    by_head = scores.view(count, query.shape[1], -1, width)
    if at_means is not None:
        by_head[..., -of.means :] += at_means[:, None, None]
    if at_asked is not None:
        asked = of.asked
        bias = at_asked[asked.sequences[:, None], :, asked.slots[:, None], asked.sinks.clamp(min=0)]
        bias = bias.masked_fill((asked.sinks < 0)[..., None], 0)
        by_head[asked.blocks, :, asked.places] += bias.mT.to(scores.dtype)
    by_head.masked_fill_(of.hidden[:, None], _HIDDEN)
    return _Part(asks, shown, values, scores.softmax(-1))


def _with_unused(of: torch.Tensor) -> torch.Tensor:
    """[N, H, d] -> [N + 1, H, d]: zeros for rows that are not used."""
    return functional.pad(of, (0, 0, 0, 0, 0, 1))


def _columns(of: torch.Tensor, rows: torch.Tensor, groups: int) -> torch.Tensor:
    """Rows, int64 [n, R], of [M, H, d] -> [n * G, H / G * R, d]."""
    found = of.index_select(0, rows.flatten()).unflatten(0, rows.shape)
    return found.transpose(1, 2).reshape(len(rows) * groups, -1, of.shape[2])


def _rows(of: torch.Tensor, count: int, heads: int) -> torch.Tensor:
    """[n * G, H / G * R, d] -> [n * R, H, d]."""
    return of.view(count, heads, -1, of.shape[2]).transpose(1, 2).flatten(0, 1)
