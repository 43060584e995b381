"""Attention to the rows of each sequence: padded in here, packed outside."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ctrsink.sequences.batch import Axis


class Memory(NamedTuple):
    """What can be attended to, of B sequences; computed once, whoever reads it."""

    keys: torch.Tensor
    """[B, H, W, D / H]."""
    values: torch.Tensor
    visible: torch.Tensor | None
    """bool [B, 1, 1, W]; None: all."""


class Remember(nn.Module):
    """Keys and values of rows.

    Behind those of a sequence comes one of zeros: attention may take nothing, and of a sequence without rows it takes just that.
    So an empty history gives 0 and no NaN (our decision).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, rows: torch.Tensor, axis: Axis | None) -> Memory:
        """Of rows [N, D] packed on an axis, or, without one, of [B, W, D] that all exist."""
        keys, values = self.key(rows), self.value(rows)
        if axis is None:
            return Memory(_split(keys, self.heads), _split(values, self.heads), None)
        width = axis.longest + 1
        keys, values = (_split(axis.pad(of, width), self.heads) for of in (keys, values))
        visible = torch.arange(width, device=rows.device) <= axis.offsets.diff()[:, None]
        return Memory(keys, values, visible[:, None, None])


class Attend(nn.Module):
    """`W_O softmax(W_Q x K^T / sqrt(d)) V`: what rows take from a memory of their sequence."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows: torch.Tensor, memory: Memory, axis: Axis | None) -> torch.Tensor:
        """Rows as for Remember; returns as many."""
        queries = self.query(rows)
        if axis is not None:
            queries = axis.pad(queries, max(1, axis.longest))
        queries = _split(queries, self.heads)
        found = functional.scaled_dot_product_attention(queries, memory.keys, memory.values, attn_mask=memory.visible)
        found = found.transpose(1, 2).flatten(2)
        return self.dropout(self.out(found if axis is None else axis.pack(found)))


class FeedForward(nn.Module):
    """`x + W2 gelu(W1 LN x)`."""

    def __init__(self, width: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, inner), nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return x + self.dropout(self.outer(functional.gelu(self.inner(self.norm(x)))))


def _split(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, W, D] -> [B, H, W, D / H]."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)
