"""The arithmetic of one branch, forward and backward: matrix products in blocks whose scores live for some blocks only.

All queries of a block share its keys, so that none is gathered for one query alone; who sees which of them is an interval. A key
that each query has for itself stands behind them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ctrsink.families.sparse.time_bias import PARTS, parts

AT_ONCE = 1024
"""Queries that are computed at once, as measured: their scores stay in the cache."""
_HIDDEN = -1e30


@dataclass(frozen=True)
class Queries:
    """R rows in N blocks of at most Q."""

    rows: torch.Tensor
    """int64 [N, Q]; R where a block has fewer."""
    seen: torch.Tensor
    """int64 [R]; behaviours that each sees."""
    times: torch.Tensor
    """int64 [R]; local seconds."""


@dataclass(frozen=True)
class Branch:
    """Keys of the blocks, K each that the block's rows share and O of each row's own, among M that are given."""

    keys: torch.Tensor
    """int64 [N, K]."""
    since: torch.Tensor
    """int64 [N, K]; seen by rows that see at least so many behaviours ..."""
    until: torch.Tensor
    """int64 [N, K]; ... and fewer than so many."""
    times: torch.Tensor
    """int64 [N, K]; local seconds."""
    own: torch.Tensor
    """int64 [R, O]."""
    shown: torch.Tensor
    """bool [R, O]; whether there is such a key. A row without its first has none at all, and its result is 0."""
    own_times: torch.Tensor
    """int64 [R, O]."""


class _Part(NamedTuple):
    """Some blocks, G of them, and what both passes compute of them."""

    rows: torch.Tensor
    """int64 [G * Q]."""
    keys: torch.Tensor
    """int64 [G * K]."""
    own: torch.Tensor
    """int64 [G * Q * O]."""
    query: torch.Tensor
    """[G, H, Q, d]."""
    shared: torch.Tensor
    """[G, H, K + O, d], zeros where the own keys would be."""
    own_keys: torch.Tensor
    """[G, H, Q, O, d]."""
    features: torch.Tensor
    """[G, F + 1, Q * (K + O)]; the parts of the bias, and what hides a key."""
    weights: torch.Tensor
    """[G, H, Q, K + O]."""
    counts: torch.Tensor
    """[G, 1, Q, 1]; 0 where a row sees nothing or there is none."""


class BranchProducts(torch.autograd.Function):
    """softmax(q k^T / sqrt(d) + bias) v of one branch; the backward pass makes the weights of some blocks again.

    In fp32 at least, whatever the projections are computed in: the products of short vectors cost less than what is around them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        coefficients: torch.Tensor,
        queries: Queries,
        branch: Branch,
    ) -> torch.Tensor:
        """Query [R, H, d], key and value [M, H, d], coefficients [H, F] of the bias, F 3 or 0 -> [R, H, d]."""
        ctx.save_for_backward(query, key, value, coefficients)
        ctx.queries, ctx.branch = queries, branch
        wide = torch.promote_types(query.dtype, torch.float32)
        out = torch.zeros(len(query) + 1, *query.shape[1:], dtype=wide, device=query.device)
        with torch.autocast(query.device.type, enabled=False):
            for part in _parts(query, key, coefficients, queries, branch):
                shared, own = _values(part, value)
                count = shared.shape[2]
                seen = _bmm(part.weights[..., :count], shared)
                seen += (part.weights[..., count:, None] * own).sum(3)
                out[part.rows] = _rows(seen * part.counts)
        return out[:-1].to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, coefficients = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        of_query = torch.zeros(len(query) + 1, *query.shape[1:], dtype=wide, device=query.device)
        of_key, of_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        of_coefficients = torch.zeros_like(coefficients, dtype=wide)
        scale, used = query.shape[2] ** -0.5, coefficients.shape[1]
        for part in _parts(query, key, coefficients, ctx.queries, ctx.branch):
            shared, own = _values(part, value)
            count = shared.shape[2]
            above = _columns(gradients[0], part.rows.clamp(max=len(query) - 1), part.query.shape[0]).to(wide) * part.counts
            of_weights = torch.empty_like(part.weights)
            of_weights[..., :count] = _bmm(above, shared.mT)
            of_weights[..., count:] = (above[..., None, :] * own).sum(-1)
            of_scores = torch._softmax_backward_data(of_weights, part.weights, -1, wide)
            of_own = of_scores[..., count:, None]
            of_query[part.rows] = _rows((_bmm(of_scores, part.shared) + (of_own * part.own_keys).sum(3)) * scale)
            of_key.index_add_(0, part.keys, _rows(_bmm(of_scores[..., :count].mT, part.query) * scale))
            of_key.index_add_(0, part.own, _own_rows(of_own * part.query[..., None, :] * scale))
            of_value.index_add_(0, part.keys, _rows(_bmm(part.weights[..., :count].mT, above)))
            of_value.index_add_(0, part.own, _own_rows(part.weights[..., count:, None] * above[..., None, :]))
            if used:
                of_coefficients += torch.bmm(of_scores.flatten(2), part.features[:, :used].mT).sum(0)
        given = of_query[:-1].to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)
        return *given, of_coefficients.to(coefficients.dtype), None, None


def _parts(
    query: torch.Tensor, key: torch.Tensor, coefficients: torch.Tensor, queries: Queries, branch: Branch
) -> Iterator[_Part]:
    blocks, size = queries.rows.shape
    step = max(1, AT_ONCE // size)
    for first in range(0, blocks, step):
        yield _part(query, key, coefficients, queries, branch, slice(first, first + step))


def _part(
    query: torch.Tensor, key: torch.Tensor, coefficients: torch.Tensor, queries: Queries, branch: Branch, of: slice
) -> _Part:
    wide = torch.promote_types(query.dtype, torch.float32)
    rows, keys = queries.rows[of], branch.keys[of]
    at = rows.clamp(max=len(query) - 1)
    (blocks, size), count, more = rows.shape, keys.shape[1], branch.own.shape[1]
    heads, width, used = query.shape[1], query.shape[2], coefficients.shape[1]

    features = torch.empty(blocks, used + 1, size, count + more, dtype=wide, device=query.device)
    if used == PARTS:
        times = queries.times[at][:, :, None]
        parts(times, branch.times[of][:, None], features[:, :used, :, :count])
        parts(times, branch.own_times[at], features[:, :used, :, count:])
    seen = queries.seen[at][:, :, None]
    features[:, used, :, :count] = (seen < branch.since[of][:, None]) | (seen >= branch.until[of][:, None])
    features[:, used, :, count:] = ~branch.shown[at]
    features[:, used] *= _HIDDEN
    features = features.flatten(2)

    asked = _columns(query, at.flatten(), blocks).to(wide)
    shared = torch.zeros(blocks, heads, count + more, width, dtype=wide, device=query.device)
    shared[:, :, :count] = _columns(key, keys.flatten(), blocks)
    own = branch.own[at].flatten()
    own_keys = _own_columns(key, own, (blocks, size, more)).to(wide)
    factors = torch.cat([coefficients.to(wide), torch.ones_like(coefficients[:, :1], dtype=wide)], 1) if used else None
    bias = features.expand(-1, heads, -1) if factors is None else torch.matmul(factors, features)
    bias = bias.reshape(blocks * heads, size, count + more)
    scale = width**-0.5
    scores = torch.baddbmm(bias, asked.flatten(0, 1), shared.flatten(0, 1).mT, alpha=scale).unflatten(0, (blocks, heads))
    scores[..., count:] += (asked[..., None, :] * own_keys).sum(-1) * scale
    exists = (rows < len(query)) & branch.shown[at][..., 0]
    return _Part(
        rows.flatten(), keys.flatten(), own, asked, shared, own_keys, features, scores.softmax(-1),
        exists[:, None, :, None].to(wide),
    )  # fmt: skip


def _values(part: _Part, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the shared keys [G, H, K, d], and of the own [G, H, Q, O, d]."""
    blocks, _, size, more = part.own_keys.shape[:4]
    wide = part.weights.dtype
    return _columns(value, part.keys, blocks).to(wide), _own_columns(value, part.own, (blocks, size, more)).to(wide)


def _columns(of: torch.Tensor, rows: torch.Tensor, blocks: int) -> torch.Tensor:
    """Rows of [M, H, d], int64 [G * n] -> [G, H, n, d]."""
    return of.index_select(0, rows).unflatten(0, (blocks, -1)).transpose(1, 2).contiguous()


def _own_columns(of: torch.Tensor, rows: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Rows of [M, H, d], int64 [G * Q * O] -> [G, H, Q, O, d]."""
    return of.index_select(0, rows).unflatten(0, shape).permute(0, 3, 1, 2, 4)


def _rows(of: torch.Tensor) -> torch.Tensor:
    """[G, H, n, d] -> [G * n, H, d]."""
    return of.transpose(1, 2).flatten(0, 1)


def _own_rows(of: torch.Tensor) -> torch.Tensor:
    """[G, H, Q, O, d] -> [G * Q * O, H, d]."""
    return of.permute(0, 2, 3, 1, 4).flatten(0, 2)


def _bmm(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """[G, H, a, b] and [G, H, b, c] -> [G, H, a, c]."""
    return torch.bmm(one.flatten(0, 1), other.flatten(0, 1)).unflatten(0, one.shape[:2])
