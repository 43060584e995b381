"""What sparse_length measures: SparseCTR's blocks on one random sequence, and dense attention in their place."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ctrsink.config.model.sparse import SparseSpec
from ctrsink.dataset.layout import Layout
from ctrsink.families.sparse.attention import EvoAttention
from ctrsink.families.sparse.model import SparseBlock
from ctrsink.families.sparse.rows import with_chunks
from ctrsink.families.sparse.sight import Sight, sight
from ctrsink.families.sparse.time_bias import PARTS, parts
from ctrsink.sequences.collate import collate
from ctrsink.sequences.columns import Sequences


def spec_of(width: int, heads: int, blocks: int, chunks: int, transition: int, window: int) -> SparseSpec:
    """The section of such a model."""
    sizes = {"width": width, "heads": heads, "blocks": blocks, "chunks": chunks, "transition": transition, "window": window}
    return SparseSpec.model_validate({"family": "sparse", **sizes})


def stack_of(spec: SparseSpec, history: int) -> tuple[nn.ModuleList, torch.Tensor, torch.Tensor, Sight]:
    """Random blocks, rows [history + 1, D] of a history with long and short gaps and its one target, profile [1, D], sight."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    times = 1_600_000_000 + (60 * draw.pareto(1, history + 1)).clip(0, 10**6).astype(np.int64).cumsum()
    one, all_of = np.array([0, 1]), np.array([0, history])
    columns = {
        "behaviour_times": times[:-1],
        "seen": np.array([history]),
        "labels": np.zeros(1, np.float32),
        "events": np.array([history]),
        "times": times[-1:],
    }
    axes = {name: "behaviours" if name == "behaviour_times" else "targets" for name in columns}
    given = Sequences(columns, axes, {"behaviours": all_of, "targets": one, "rows": all_of + one}, counts="rows")
    layout = Layout("sparse", "per_target", history, 1, chunks=spec.chunks, chunking=spec.chunking)
    batch = collate(with_chunks(given, layout), one[:1], one[:1])
    blocks = nn.ModuleList(SparseBlock(spec) for _ in range(spec.blocks))
    return blocks, torch.randn(history + 1, spec.width), torch.randn(1, spec.width), sight(batch, spec)


class FullAttention(nn.Module):
    """One attention of every row to itself and all rows before it, by torch's SDPA with the same time bias in its mask.

    It sees more than the three branches do, but their masks would save nothing: SDPA computes what a mask hides as well.
    """

    def __init__(self, of: EvoAttention) -> None:
        super().__init__()
        assert of.bias is not None
        self.project, self.bias, self.out, self.heads = of.project, of.bias, of.out, of.heads

    def forward(self, rows: torch.Tensor, profiles: torch.Tensor, sight: Sight) -> torch.Tensor:
        """As EvoAttention.forward."""
        query, key, value = self.project(rows).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)[:, None]
        times, count = sight.queries.times, len(rows)
        found = torch.empty(PARTS, count, count)
        parts(times[:, None], times, found)
        mask = (self.bias()[0] @ found.flatten(1)).unflatten(1, (count, count))
        # In place: a copy of it would be a contestant's own fault.
        mask = mask.masked_fill_(torch.ones(count, count, dtype=torch.bool).triu(1), float("-inf"))
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[None])
        return self.out(out[0].transpose(0, 1).flatten(1))
