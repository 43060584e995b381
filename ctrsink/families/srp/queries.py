"""Querying transformer: a few learned vectors gather the behaviours, whatever the candidate (arXiv 2407.19658)."""

import torch
from torch import nn

from ctrsink.config.model.srp import SrpSpec
from ctrsink.families.srp.attention import Attend, FeedForward, Remember
from ctrsink.sequences.batch import Axis


class QueryBlock(nn.Module):
    """`q += attention among queries`; `q += attention to behaviours`; `q += FFN(LN q)` (the order is our decision)."""

    def __init__(self, spec: SrpSpec) -> None:
        super().__init__()
        self.norm, self.cross_norm = nn.LayerNorm(spec.width), nn.LayerNorm(spec.width)
        self.own, self.behaviours = (Remember(spec.width, spec.heads) for _ in range(2))
        self.attend, self.cross = (Attend(spec.width, spec.heads, spec.dropout) for _ in range(2))
        self.feed = FeedForward(spec.width, spec.inner, spec.dropout)

    def forward(self, queries: torch.Tensor, states: torch.Tensor, axis: Axis) -> torch.Tensor:
        """Queries [B, m, D] and states [K, D] of behaviours on their axis -> [B, m, D]."""
        normed = self.norm(queries)
        queries = queries + self.attend(normed, self.own(normed, None), None)
        queries = queries + self.cross(self.cross_norm(queries), self.behaviours(states, axis), None)
        return self.feed(queries)


class Queries(nn.Module):
    """What m queries found of each sequence. As many blocks as the encoder has, all on its last states (our decision)."""

    def __init__(self, spec: SrpSpec) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(spec.queries, spec.width))
        self.blocks = nn.ModuleList(QueryBlock(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, states: torch.Tensor, axis: Axis) -> torch.Tensor:
        """States [K, D] of the behaviours of B sequences -> [B, m D]."""
        queries = self.start.expand(len(axis.lengths), -1, -1)
        for block in self.blocks:
            queries = block(queries, states, axis)
        return self.norm(queries).flatten(1)
