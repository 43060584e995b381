"""Batches of the family `sparse` from chronologies made by hand; its attention key by key, as its definition reads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from ctrsink.config.model.sparse import SparseSpec
from ctrsink.config.stages import Objective
from ctrsink.dataset.events import Events
from ctrsink.dataset.layout import Layout
from ctrsink.families.facts import Facts
from ctrsink.families.sparse.attention import EvoAttention
from ctrsink.families.sparse.model import Sparse
from ctrsink.families.sparse.rows import with_chunks
from ctrsink.features.ragged import Ragged
from ctrsink.sequences import behaviours
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.collate import collate
from ctrsink.sequences.windows import Cuts

FACTS = Facts(vocabulary=10)
OPINIONS = 5
CLICK = Objective()


def tiny_spec(**changes: object) -> SparseSpec:
    sides = {
        "behaviours": ("item_id", "feedback", "previous_gap", "deviation"),
        "target": ("item_id", "user_id", "item_mean", "user_res"),
    }
    sizes = {"rows": 50, "buckets": 20, "embedding_size": 4, "width": 8, "heads": 2, "chunks": 4, "window": 5, "layers": (6,)}
    return SparseSpec.model_validate({"family": "sparse", **sides, **sizes, **changes})


def tiny_layout(spec: SparseSpec, examples: str = "per_user", history: int = 1000) -> Layout:
    return Layout(
        family="sparse",
        examples=examples,  # pyright: ignore[reportArgumentType]
        history=history,
        targets=1000,
        signals=("item_id", "feedback", "previous_gap"),
        buckets=spec.buckets,
        rows=spec.rows,
        numbers=("deviation",),
        target_signals=("item_id", "user_id"),
        target_rows=spec.rows,
        target_numbers=("item_mean", "user_res"),
        chunks=spec.chunks,
        chunking=spec.chunking,
    )


@dataclass(frozen=True)
class User:
    """One chronology, and which of its events are targets."""

    events: Events
    targets: np.ndarray


def a_user(gaps: Sequence[int], targets: Sequence[int], seed: int = 0, request: bool = False) -> User:
    """One event more than gaps. `request`: the targets are the last events, shown together behind those before them."""
    draw, n = np.random.default_rng(seed), len(gaps) + 1
    known = np.arange(n)
    if request:
        known[list(targets)] = min(targets)
    rows = np.asarray(targets)
    events = Events(
        texts=np.zeros(n, np.int64),
        feedbacks=np.zeros(n, np.int64),
        timestamps=1_600_000_000 + np.append(0, np.cumsum(np.asarray(gaps, np.int64))),
        labels=draw.integers(0, 2, n).astype(np.int8),
        known=known,
        tokens=Ragged.of([np.zeros(1, np.int64)]),
        numbers=draw.normal(size=(n, 1)).astype(np.float32),
        target_numbers=draw.normal(size=(n, 2)).astype(np.float32),
        categories={
            "item_id": draw.integers(1, 20, n),
            "user_id": np.full(n, 1 + seed),
            "feedback": draw.integers(0, OPINIONS, n),
        },
    )
    return User(events, rows)


def a_batch(users: Sequence[User], layout: Layout) -> Batch:
    """A sequence of each."""
    cuts = Cuts(
        [user.events for user in users],
        np.ones(len(users), np.int64),
        np.zeros(len(users), np.int64),
        Ragged.of([user.targets for user in users]),
    )
    number = np.arange(len(users))
    return collate(with_chunks(behaviours.encode(cuts, layout), layout), number, number)


def a_model(spec: SparseSpec, seed: int = 0, double: bool = False) -> Sparse:
    torch.manual_seed(seed)
    model = Sparse(spec).eval()
    with torch.no_grad():  # gates and coefficients with an effect
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double() if double else model


def changed_after(user: User, event: int, seed: int) -> User:
    """The same user up to the event, with another id, feedback, label, numbers and gap of it and of each later event."""
    draw, e = np.random.default_rng(seed), user.events
    later = np.arange(len(e.texts)) >= event
    gaps = np.append(0, np.diff(e.timestamps))
    gaps = np.where(later & (np.arange(len(gaps)) > 0), draw.integers(0, 1_000_000, len(gaps)), gaps)
    values = {name: np.where(later, draw.permutation(column), column) for name, column in e.categories.items()}
    events = replace(
        e,
        timestamps=e.timestamps[0] + gaps.cumsum(),
        labels=np.where(later, 1 - e.labels, e.labels).astype(np.int8),
        numbers=np.where(later[:, None], -1 - e.numbers, e.numbers),  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
        target_numbers=np.where(later[:, None], 3 + e.target_numbers, e.target_numbers),  # pyright: ignore[reportOperatorIssue]
        categories={**values, "user_id": e.categories["user_id"]},
    )
    return User(events, user.targets)


def plain_chunks(times: Sequence[int], spec: SparseSpec) -> list[range]:
    """All chunks of what is seen, the last among them, by their definition."""
    count = len(times)
    if spec.chunking == "equal":
        length = 1
        while math.ceil(count / length) > spec.chunks:
            length *= 2
        cuts = list(range(length, count, length))
    else:
        gaps = sorted(range(1, count), key=lambda i: (times[i - 1] - times[i], i))
        cuts = sorted(gaps[: spec.chunks - 1])
    bounds = [0, *cuts, count]
    return [range(a, b) for a, b in pairwise(bounds) if a < b]


class DenseAttention(nn.Module):
    """As EvoAttention, every position for itself, with the keys that the definition names."""

    def __init__(self, of: EvoAttention, spec: SparseSpec, batch: Batch) -> None:
        super().__init__()
        self.of, self.spec, self.batch = of, spec, batch

    def forward(self, rows: torch.Tensor, profiles: torch.Tensor, sight: object) -> torch.Tensor:
        spec, batch, of = self.spec, self.batch, self.of
        every = of.project(torch.cat([rows, profiles])).unflatten(-1, (3, spec.heads, -1))
        out = [torch.zeros(0)] * len(rows)
        axes, inputs = batch.axes, batch.inputs
        for sequence in range(len(axes["targets"].lengths)):
            own = {name: slice(*axes[name].offsets[sequence : sequence + 2].tolist()) for name in ("behaviours", "targets")}
            at = inputs["behaviour_rows"][own["behaviours"]].tolist()
            times = inputs["behaviour_times"][own["behaviours"]].tolist()
            asked = inputs["target_rows"][own["targets"]].tolist()
            seen = inputs["seen"][own["targets"]].tolist()
            asked_times = batch.targets.times[own["targets"]].tolist()
            profile = len(rows) + sequence
            positions = [*zip(at, range(len(at)), times, strict=True), *zip(asked, seen, asked_times, strict=True)]
            for row, count, time in positions:
                chunks = plain_chunks(times[:count], spec)
                ends = [j for chunk in chunks for j in chunk[-spec.transition :]]
                latest = range(max(0, count - spec.window), count)
                keys = {
                    "global": [(every[[at[j] for j in chunk]].mean(0), times[chunk[-1]]) for chunk in chunks],
                    "transition": [(every[at[j]], times[j]) for j in ends],
                    "local": [(every[at[j]], times[j]) for j in latest] + [(every[row], time), (every[profile], None)],
                }
                views = [self._attend(every[row, 0], time, keys[name], number) for number, name in enumerate(spec.branches)]
                shares = of.gate(torch.cat(views)).softmax(-1)
                out[row] = of.out(sum(share * view for share, view in zip(shares, views, strict=True)))
        return torch.stack(out)

    def _attend(self, query: torch.Tensor, time: int, keys: list[tuple[torch.Tensor, int | None]], branch: int) -> torch.Tensor:
        if not keys:
            return query.new_zeros(self.spec.width)
        found = torch.stack([vectors for vectors, _ in keys])
        scores = torch.einsum("hd,khd->hk", query, found[:, 1]) / math.sqrt(query.shape[-1])
        if self.of.bias is not None:
            parts = query.new_tensor([plain_parts(time, time if other is None else other) for _, other in keys])
            scores = scores - self.of.bias.coefficients[branch] @ parts.T
        return torch.einsum("hk,khd->hd", scores.softmax(-1), found[:, 2]).flatten()


def plain_parts(one: int, other: int) -> tuple[float, float, float]:
    hours = abs(one // 3600 % 24 - other // 3600 % 24)
    weekends = [t // 86400 % 7 in (2, 3) for t in (one, other)]
    return float(max(one - other, 1).bit_length() - 1), math.sin(math.pi * hours / 24), float(weekends[0] != weekends[1])


def dense_logits(model: Sparse, batch: Batch) -> torch.Tensor:
    """Those of the same model with its attention replaced; gradients arrive at the model's own weights."""
    kept = [block.attention for block in model.blocks]
    for block, attention in zip(model.blocks, kept, strict=True):
        block.attention = DenseAttention(attention, model.spec, batch)  # pyright: ignore[reportArgumentType]
    try:
        return model.logits(batch, CLICK)
    finally:
        for block, attention in zip(model.blocks, kept, strict=True):
            block.attention = attention
