"""EvoAttention: three views of a history, each attended for itself, mixed at every position (SparseCTR, arXiv 2601.17836)."""

import torch
from torch import nn

from ctrsink.attention.means import means
from ctrsink.config.model.sparse import SparseSpec
from ctrsink.families.sparse.products import BranchProducts
from ctrsink.families.sparse.sight import Sight
from ctrsink.families.sparse.time_bias import TimeBias


class EvoAttention(nn.Module):
    """Branches `global`, `transition` and `local`, each `softmax(q k^T / sqrt(d / H) + b) v` with keys of its own.

    One projection serves them all. A position sees, at any length, |P| summaries of chunks, the last m behaviours of each, its w
    latest predecessors, the user's profile, and, in the branch `local`, itself (our decision). A summary is the mean of keys and
    of values. A gate weighs the branches at each position, `softmax([o_g; o_t; o_l] W)`; of nothing the first two give 0.
    """

    def __init__(self, spec: SparseSpec) -> None:
        super().__init__()
        self.branches, self.heads = spec.branches, spec.heads
        self.project = nn.Linear(spec.width, 3 * spec.width, bias=False)
        self.bias = TimeBias(len(spec.branches), spec.heads) if spec.time_bias else None
        self.gate = nn.Linear(len(spec.branches) * spec.width, len(spec.branches), bias=False)
        self.out = nn.Linear(spec.width, spec.width, bias=False)

    def forward(self, rows: torch.Tensor, profiles: torch.Tensor, sight: Sight) -> torch.Tensor:
        """Rows [R, D] and profiles of the sequences [B, D] -> [R, D]."""
        count = len(rows)
        query, key, value = self.project(torch.cat([rows, profiles])).unflatten(-1, (3, self.heads, -1)).unbind(1)
        coefficients = query.new_zeros(len(self.branches), self.heads, 0) if self.bias is None else self.bias()
        banks = {"transition": (key[:count], value[:count]), "local": (key, value)}
        if "global" in self.branches:
            behaviours, starts, ends = sight.behaviours, sight.starts, sight.ends
            banks["global"] = means(key[behaviours], starts, ends), means(value[behaviours], starts, ends)
        found = [
            BranchProducts.apply(query[:count], *banks[name], of, sight.queries, sight.branches[name])
            for name, of in zip(self.branches, coefficients, strict=True)
        ]
        views = torch.stack(found, 1).flatten(2)
        shares = self.gate(views.flatten(1)).softmax(-1, dtype=torch.promote_types(views.dtype, torch.float32))
        return self.out((shares[..., None] * views).sum(1))
