"""The network of HSTU (arXiv 2402.17152, section 3.1), with targets that ask a shared history.

In the paper items and actions alternate in one sequence. Here, by our own decision, a behaviour is one position with both, and
targets stand behind the behaviours: each sees those that it may, and itself, so that a sequence of many targets needs one pass.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from ctrsink.config.model.hstu import HstuSpec
from ctrsink.config.stages import Objective
from ctrsink.families.ids.embedding import EventEmbedding
from ctrsink.families.ids.module import Head, IdsModule, linear_flops, mlp
from ctrsink.families.protocol import Flops
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.behaviours import BEHAVIOURS
from ctrsink.sequences.columns import TARGETS

BUCKETS = 32  # of a gap in time or in places, on a scale of powers of two


class Unit(nn.Module):
    """`x + W2(norm(A V) * U)` with `U, V, Q, K = silu(W1 norm(x))` and `A = silu(Q K^T / sqrt(d) + rab) / n`.

    A is no share of 1: how much there is that fits counts (section 3.1). n is what a position sees; the paper's is the length
    of the sequence, which would let a neighbour of the batch, or later behaviours, into a score.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.inner = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 4 * width), nn.Linear(width, width)
        self.gap, self.distance = nn.Embedding(BUCKETS, heads), nn.Embedding(BUCKETS, heads)
        for table in (self.gap, self.distance):
            nn.init.zeros_(table.weight)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, seen: torch.Tensor, gaps: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        """States [B, L, D]; what each position sees, bool [B, L, L]; buckets of pairs, int64 [B, L, L] each -> [B, L, D]."""
        b, length, width = x.shape
        u, *parts = functional.silu(self.project(self.norm(x))).chunk(4, -1)
        v, q, k = (part.view(b, length, self.heads, -1).transpose(1, 2) for part in parts)
        bias = (self.gap(gaps) + self.distance(distances)).permute(0, 3, 1, 2)
        weights = functional.silu(q @ k.transpose(2, 3) * (width // self.heads) ** -0.5 + bias)
        weights = weights.masked_fill(~seen[:, None], 0.0) / seen.sum(-1)[:, None, :, None].clamp(min=1)
        found = (weights.to(v.dtype) @ v).transpose(1, 2).reshape(b, length, width)
        return x + self.drop(self.out(self.inner(found) * u))


class Hstu(IdsModule):
    """Logits of targets, each a position behind the behaviours that it sees."""

    def __init__(self, spec: HstuSpec) -> None:
        super().__init__()
        self.embedding = EventEmbedding(spec, spec.width)
        self.units = nn.ModuleList(Unit(spec.width, spec.heads, spec.dropout) for _ in range(spec.blocks))
        self.norm = nn.LayerNorm(spec.width)
        self.head = Head(mlp(spec.width + self.embedding.target_count, spec.layers, spec.dropout))
        self.width = spec.width

    def logits(self, batch: Batch, objective: Objective) -> torch.Tensor:
        inputs, behaviours, targets = batch.inputs, batch.axes[BEHAVIOURS], batch.axes[TARGETS]
        width = max(1, behaviours.longest)  # every rank runs every module, whatever its batch holds
        x = torch.cat(
            [
                behaviours.pad(self.embedding.behaviours(inputs["signals"], inputs["numbers"]), width),
                targets.pad(self.embedding.targets(inputs["target_signals"], inputs["target_numbers"]), targets.longest),
            ],
            1,
        )
        times = [behaviours.pad(inputs["behaviour_times"], width), targets.pad(batch.targets.times, targets.longest)]
        seen, gaps, distances = pairs(batch, width, torch.cat(times, 1))
        for unit in self.units:
            x = unit(x, seen, gaps, distances)
        states = targets.pack(self.norm(x)[:, width:])
        return self.head(torch.cat([states, inputs["target_numbers"]], -1)).squeeze(-1)

    def flop_count(self, objective: Objective) -> Callable[[Batch], Flops]:
        of_event, of_target = linear_flops(self.embedding) // 2 + linear_flops(self.units), linear_flops(self.head)
        of_pair = 4 * self.width * len(self.units)

        def count(batch: Batch) -> Flops:
            behaviours, targets = batch.axes[BEHAVIOURS], batch.axes[TARGETS].total
            causal = int((behaviours.lengths * (behaviours.lengths + 1) // 2).sum())
            matrices = (behaviours.total + targets) * of_event + targets * of_target
            return Flops(3 * matrices, 3 * of_pair * (causal + batch.costs["pairs"] + targets))

        return count


def pairs(batch: Batch, width: int, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each two positions, [B, L, L]: whether the first sees the second, and buckets of their gap in time and in places.

    Args:
        width: places of behaviours; those of targets stand behind them.
        times: int64 [B, L]; seconds since 1970.
    """
    behaviours, targets = batch.axes[BEHAVIOURS], batch.axes[TARGETS]
    columns = torch.arange(times.shape[1], device=times.device)
    # A position sees so many first behaviours; a behaviour itself too, as the last of them.
    upto = torch.cat([(columns[:width] + 1).expand(len(times), -1), targets.pad(batch.inputs["seen"], targets.longest)], 1)
    exists = (columns < behaviours.offsets.diff()[:, None])[:, None, :]
    itself = columns[:, None] == columns[None, :]
    seen = ((columns < upto[:, :, None]) & exists) | itself
    gaps = (times[:, :, None] - times[:, None, :]).clamp(min=0)
    # A target stands in the place behind what it sees.
    place = torch.where(columns < width, columns, upto)
    distances = (place[:, :, None] - columns).clamp(min=0).masked_fill(itself, 0)
    return seen, bucket(gaps), bucket(distances)


def bucket(values: torch.Tensor) -> torch.Tensor:
    """Whole numbers from 0 on -> `floor(log2(1 + value))`, at most BUCKETS - 1."""
    return torch.log2(values.double() + 1).long().clamp(max=BUCKETS - 1)
