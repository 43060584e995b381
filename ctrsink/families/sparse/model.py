"""SparseCTR (arXiv 2601.17836): behaviours and candidates pass blocks of sparse attention together, each candidate for itself."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ctrsink.config.model.sparse import SparseSpec
from ctrsink.config.stages import Objective
from ctrsink.families.ids.embedding import EventEmbedding
from ctrsink.families.ids.module import Head, IdsModule, linear_flops, mlp
from ctrsink.families.protocol import Flops
from ctrsink.families.sparse.attention import EvoAttention
from ctrsink.families.sparse.profile import Profile
from ctrsink.families.sparse.rows import ROWS
from ctrsink.families.sparse.sight import Sight, sight
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.behaviours import BEHAVIOURS


class SparseBlock(nn.Module):
    """`x += Evo(RMSNorm(x))`, then `x += (SiLU(y W1) * (y W2)) W3` of `y = RMSNorm(x)`, 3 D wide inside."""

    def __init__(self, spec: SparseSpec) -> None:
        super().__init__()
        self.norm, self.inner_norm = nn.RMSNorm(spec.width), nn.RMSNorm(spec.width)
        self.attention = EvoAttention(spec)
        self.inner = nn.Linear(spec.width, 6 * spec.width, bias=False)
        self.outer = nn.Linear(3 * spec.width, spec.width, bias=False)

    def forward(self, rows: torch.Tensor, profiles: torch.Tensor, sight: Sight) -> torch.Tensor:
        """Rows [R, D] and profiles of the sequences [B, D] -> [R, D]."""
        normed = self.norm(torch.cat([rows, profiles]))
        rows = rows + self.attention(normed[: len(rows)], normed[len(rows) :], sight)
        one, other = self.inner(self.inner_norm(rows)).chunk(2, -1)
        return rows + self.outer(functional.silu(one) * other)


class Sparse(IdsModule):
    """Logits of targets from `[candidate's output, profile, numbers]`; that numbers stand there once more is our decision."""

    def __init__(self, spec: SparseSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = EventEmbedding(spec, spec.width)
        self.profile = Profile(spec)
        self.blocks = nn.ModuleList(SparseBlock(spec) for _ in range(spec.blocks))
        self.norm = nn.RMSNorm(spec.width)
        self.head = Head(mlp(2 * spec.width + self.embedding.target_count, spec.layers, spec.dropout))

    def logits(self, batch: Batch, objective: Objective) -> torch.Tensor:
        inputs = batch.inputs
        behaviours = self.embedding.behaviours(inputs["signals"], inputs["numbers"])
        targets = self.embedding.targets(inputs["target_signals"], inputs["target_numbers"])
        profiles = self.profile(batch, self.embedding)
        wide = torch.promote_types(targets.dtype, torch.float32)
        rows = torch.zeros(batch.axes[ROWS].total, self.spec.width, dtype=wide, device=batch.device)
        rows = rows.index_copy(0, inputs["behaviour_rows"], behaviours.to(wide))
        rows = rows.index_copy(0, inputs["target_rows"], targets.to(wide))
        seen = sight(batch, self.spec)
        for block in self.blocks:
            rows = block(rows, profiles, seen)
        asked = self.norm(rows[inputs["target_rows"]])
        read = [asked, profiles[batch.axes["targets"].owner], inputs["target_numbers"]]
        return self.head(torch.cat(read, -1)).squeeze(-1)

    def decays(self, name: str, dimensions: int) -> bool:
        return super().decays(name, dimensions) and not name.endswith(".coefficients")  # a table of scalars

    def flop_count(self, objective: Objective) -> Callable[[Batch], Flops]:
        of_event, of_row, of_target = (linear_flops(part) for part in (self.embedding, self.blocks, self.head))
        projections = [part.project for part in self.modules() if isinstance(part, EvoAttention)]
        of_profile = sum(linear_flops(part) for part in (self.profile, *projections))

        def count(batch: Batch) -> Flops:
            rows, targets, sequences = batch.axes[ROWS].total, batch.axes["targets"].total, len(batch.axes[ROWS].lengths)
            matrices = rows * (of_event // 2 + of_row) + targets * of_target + sequences * of_profile
            # Scores and sums of values, a multiply-add each, of every key and dimension.
            attention = 4 * self.spec.width * self.spec.blocks * keys_read(batch, self.spec)
            return Flops(3 * matrices, 3 * attention)

        return count


def keys_read(batch: Batch, spec: SparseSpec) -> int:
    """Keys that all rows of a batch see in one layer, with what a target sees taken as all behaviours of its sequence.

    Of s behaviours a row sees |P| summaries, |P| m behaviours at ends, w latest, or s where that is less, the profile and itself.
    """
    most = {"global": spec.chunks, "transition": spec.chunks * spec.transition, "local": spec.window}
    counts, targets = batch.axes[BEHAVIOURS].lengths, batch.axes["targets"].lengths
    found = 2 * batch.axes[ROWS].total if "local" in spec.branches else 0
    for name in spec.branches:
        full = np.minimum(counts, most[name])
        # 0 + 1 + .. for the first behaviours, then all that a branch reads.
        found += int((full * (full - 1) // 2 + full * (counts - full) + full * targets).sum())
    return found
