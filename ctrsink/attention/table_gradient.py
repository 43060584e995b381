"""The gradient of a compact bias, from the few pairs of tokens that it is added to."""

from dataclasses import dataclass
from typing import Any

import torch

from ctrsink.attention.rule_packed import Sees


@dataclass(frozen=True)
class Pairs:
    """The R rows and K columns of each sequence's bias, as indices in the packed row."""

    rows: torch.Tensor
    """int64 [B, R]."""
    columns: torch.Tensor
    """int64 [B, K]."""
    used: torch.Tensor
    """bool [B, R, K]; both exist, and the row sees the column."""

    @classmethod
    def of(
        cls, rows: torch.Tensor, row_valid: torch.Tensor, columns: torch.Tensor, column_valid: torch.Tensor, sees: Sees
    ) -> "Pairs":
        seen = sees(None, None, rows[:, :, None], columns[:, None, :])
        return cls(rows, columns, seen & row_valid[:, :, None] & column_valid[:, None, :])


def with_table_gradient(
    out: torch.Tensor,
    bias: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lse: torch.Tensor,
    pairs: Pairs,
    scale: float,
) -> torch.Tensor:
    """`out` as it is; its gradient reaches `bias` too.

    Args:
        out: output [1, H, N, d] of an attention that added `bias` to the logits of `pairs`, and knows no gradient of it.
        bias: [B, H or 1, R, K].
        lse: [1, H, N]; logarithm of the sum of each row's exponentials, bias included.
        scale: factor of the products of `query` [1, H, N, d] and `key` [1, H_kv, N, d] in the logits.
    """
    if not (torch.is_grad_enabled() and bias.requires_grad):
        return out
    return _TableGradient.apply(out, bias, query.detach(), key.detach(), value.detach(), lse.detach(), pairs, scale)  # pyright: ignore[reportReturnType]


class _TableGradient(torch.autograd.Function):
    """d out_i / d bias_ij = p_ij (v_j - out_i): no more is needed than what the attention keeps for its own backward pass."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, bias: torch.Tensor, *rest: Any) -> torch.Tensor:
        query, key, value, lse, ctx.pairs, ctx.scale = rest
        ctx.save_for_backward(out, bias, query, key, value, lse)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out, bias, query, key, value, lse = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        repeat = query.shape[1] // key.shape[1]
        # Heads first: [H, B, R or K, d].
        rows = [x[0][:, pairs.rows].float() for x in (query, out, grads[0])]
        columns = [x[0][:, pairs.columns].float().repeat_interleave(repeat, 0) for x in (key, value)]
        logits = rows[0] @ columns[0].transpose(2, 3) * ctx.scale + bias.float().transpose(0, 1)
        weights = (logits - lse[0][:, pairs.rows][..., None].float()).exp().masked_fill(~pairs.used, 0.0)
        inner = rows[2] @ columns[1].transpose(2, 3) - (rows[2] * rows[1]).sum(-1, keepdim=True)
        found = (weights * inner).transpose(0, 1).sum_to_size(bias.shape).to(bias.dtype)
        return grads[0], found, None, None, None, None, None, None
