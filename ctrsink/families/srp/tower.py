"""The CTR tower: from a candidate, the queries of its sequence and its numbers to a logit (arXiv 2407.19658)."""

import torch
from torch import nn

from ctrsink.config.model.srp import SrpSpec
from ctrsink.families.ids.module import Head, mlp
from ctrsink.sequences.batch import Axis


class Tower(nn.Module):
    """An MLP over `[candidate; queries; numbers]`. The first layer's part of the queries is computed once for a sequence."""

    def __init__(self, spec: SrpSpec, numbers: int) -> None:
        super().__init__()
        first, *rest = spec.tower
        self.of_target = nn.Linear(spec.width + numbers, first)
        self.of_queries = nn.Linear(spec.queries * spec.width, first, bias=False) if spec.queries else None
        self.rest = Head(nn.GELU(), nn.Dropout(spec.dropout), mlp(first, rest, spec.dropout))

    def forward(
        self, candidates: torch.Tensor, numbers: torch.Tensor, queries: torch.Tensor | None, targets: Axis
    ) -> torch.Tensor:
        """[T, D], [T, G] and, of sequences, [B, m D] -> [T]."""
        found = self.of_target(torch.cat([candidates, numbers], -1))
        if self.of_queries is not None:
            found = found + self.of_queries(queries)[targets.owner]
        return self.rest(found).squeeze(-1)
