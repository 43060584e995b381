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
    lse: torch.Tensor,
    bias: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pairs: Pairs,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` and `lse` as they are; their gradients reach `bias` too.

    Args:
        out: output [1, H, N, d] of an attention that added `bias` to the logits of `pairs`, and knows no gradient of it.
        lse: [1, H, N]; logarithm of the sum of each row's exponentials, bias included.
        bias: [B, H or 1, R, K].
        scale: factor of the products of `query` [1, H, N, d] and `key` [1, H_kv, N, d] in the logits.
    """
    if not (torch.is_grad_enabled() and bias.requires_grad):
        return out, lse
    return _TableGradient.apply(out, lse, bias, query.detach(), key.detach(), value.detach(), pairs, scale)  # pyright: ignore[reportReturnType]


class _TableGradient(torch.autograd.Function):
    """d out_i / d bias_ij = p_ij (v_j - out_i), d lse_i / d bias_ij = p_ij: no more is needed than what the attention keeps."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, lse: torch.Tensor, bias: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        query, key, value, ctx.pairs, ctx.scale = rest
        ctx.save_for_backward(out, lse, bias, query, key, value)
        ctx.set_materialize_grads(False)  # mostly nobody asks for that of lse
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        out, lse, bias, query, key, value = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        of_out = torch.zeros_like(out) if grads[0] is None else grads[0]
        repeat = query.shape[1] // key.shape[1]
        # Heads first: [H, B, R or K, d].
        rows = [x[0][:, pairs.rows].float() for x in (query, out, of_out)]
        columns = [x[0][:, pairs.columns].float().repeat_interleave(repeat, 0) for x in (key, value)]
        logits = rows[0] @ columns[0].transpose(2, 3) * ctx.scale + bias.float().transpose(0, 1)
        weights = (logits - lse[0][:, pairs.rows][..., None].float()).exp().masked_fill(~pairs.used, 0.0)
        inner = rows[2] @ columns[1].transpose(2, 3) - (rows[2] * rows[1]).sum(-1, keepdim=True)
        if grads[1] is not None:
            inner = inner + grads[1][0][:, pairs.rows][..., None].float()
        found = (weights * inner).transpose(0, 1).sum_to_size(bias.shape).to(bias.dtype)
        return *grads, found, None, None, None, None, None
