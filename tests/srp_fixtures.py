"""Requests behind histories, drawn at random, as the family srp is given them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ctrsink.config.model.srp import SrpSpec
from ctrsink.config.stages import Objective
from ctrsink.dataset.events import Events
from ctrsink.dataset.layout import Layout
from ctrsink.families.facts import Facts
from ctrsink.families.registry import family_of
from ctrsink.families.srp.model import Srp
from ctrsink.features.ragged import Ragged, ranges
from ctrsink.features.registry import of_kind, signal
from ctrsink.sequences import behaviours
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.collate import collate
from ctrsink.sequences.columns import Sequences
from ctrsink.sequences.windows import Cuts

OF_CLOZE, OF_CLICK = ("ids", "embedding", "encoder", "cloze"), ("ids", "embedding", "encoder", "cross", "queries", "tower")
CLOZE, CLICK = Objective(kind="cloze"), Objective(kind="click")
FEEDBACKS = 5
FACTS = Facts(vocabulary=0)
BEHAVIOURS = ("item_id", "hashed.item.brand", "item_mean", "item.price", "feedback", "deviation", "hour", "previous_gap")
TARGET = ("item_id", "user_id", "weekday", "item_mean", "expected")


def spec_of(**given: Any) -> SrpSpec:
    """A small model of all kinds of signals."""
    small: dict[str, Any] = {"behaviours": BEHAVIOURS, "target": TARGET, "rows": 40, "buckets": 12, "embedding_size": 8}
    small |= {"width": 16, "inner": 32, "heads": 2, "queries": 3, "tower": (16, 8), "max_history": 20}
    return SrpSpec.model_validate({"family": "srp"} | small | given)


def model_of(spec: SrpSpec, seed: int = 0, precision: str = "fp32") -> Srp:
    found = family_of("srp").build(spec, FACTS, seed, precision)
    assert isinstance(found, Srp)
    return found.eval()


def layout_of(spec: SrpSpec, history: int = 20) -> Layout:
    return Layout(
        family="srp", examples="per_request", history=history, targets=100, buckets=spec.buckets, rows=spec.rows,
        signals=of_kind(spec.behaviours, numbers=False), numbers=of_kind(spec.behaviours, numbers=True),
        target_signals=of_kind(spec.target, numbers=False), target_rows=spec.rows,
        target_numbers=of_kind(spec.target, numbers=True),
    )  # fmt: skip


def drawn_events(lengths: Sequence[int], asked: Sequence[int], spec: SrpSpec, seed: int = 0) -> Events:
    """Users of so many behaviours each, and then of one request for so many items."""
    chance = np.random.default_rng(seed)
    sizes = np.array(lengths) + np.array(asked)
    total = int(sizes.sum())
    place = ranges(np.zeros_like(sizes), sizes)
    known = np.minimum(place, np.array(lengths).repeat(sizes))
    user = np.arange(len(sizes)).repeat(sizes)

    def values(name: str) -> np.ndarray:
        if name == "user_id":
            return user * 7919
        return chance.integers(0, 10**6 if signal(name).hashed else signal(name).values or FEEDBACKS, total)

    names = dict.fromkeys(n for side in (spec.behaviours, spec.target) for n in of_kind(side, numbers=False))
    counts = [len(of_kind(side, numbers=True)) for side in (spec.behaviours, spec.target)]
    numbers = [chance.normal(size=(total, count)).astype(np.float32) for count in counts]
    return Events(
        texts=np.zeros(total, np.int64),
        feedbacks=np.zeros(total, np.int64),
        timestamps=10**9 + known * 5000 + chance.integers(0, 4000, total) * (known == place),
        labels=chance.integers(0, 2, total).astype(np.int8),
        known=known,
        tokens=Ragged.of([np.zeros(1, np.int64)]),
        numbers=numbers[0],
        target_numbers=numbers[1],
        categories={name: values(name) for name in names if signal(name).kind == "category"},
    )


def sequences_of(
    events: Events, lengths: Sequence[int], asked: Sequence[int], spec: SrpSpec, folded: bool = True, history: int = 20
) -> Sequences:
    """A sequence for each request, or, where they are not folded, for each of its targets."""
    behind, counts = np.array(lengths), np.array(asked)
    begins = (behind + counts).cumsum() - behind - counts
    rows = ranges(begins + behind, counts)
    if not folded:
        begins, counts = begins.repeat(counts), np.ones(len(rows), np.int64)
    cuts = Cuts([events], np.array([len(counts)]), begins, Ragged(rows, np.append(0, counts.cumsum())))
    return behaviours.encode(cuts, layout_of(spec, history))


def batch_of(
    lengths: Sequence[int], asked: Sequence[int], spec: SrpSpec, seed: int = 0, folded: bool = True,
    changed: Callable[[Events], Events] = lambda events: events,
) -> Batch:  # fmt: skip
    """All requests in one batch; users are numbered by request."""
    found = sequences_of(changed(drawn_events(lengths, asked, spec, seed)), lengths, asked, spec, folded)
    users = np.arange(len(lengths))
    return collate(found, np.arange(len(found)), users if folded else users.repeat(np.array(asked)))


def training_groups(model: Srp, groups: tuple[str, ...]) -> list[torch.nn.Parameter]:
    """Freeze all that a stage of these groups does not train; what it does."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.trained_as(name, groups) is not None)
        parameter.grad = None
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def with_inputs(batch: Batch, **inputs: torch.Tensor) -> Batch:
    return dataclasses.replace(batch, inputs=batch.inputs | inputs)
