"""What benchmarks.bridge measures: models and, from one random log, the sequences that each of them reads."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.shapes import VOCABULARY, shape_of
from ctrsink.config.model import DecoderSpec, DinSpec
from ctrsink.dataset.events import Events
from ctrsink.dataset.layout import Layout
from ctrsink.families.facts import Facts, Wording
from ctrsink.families.registry import family_of
from ctrsink.features.ragged import Ragged
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.collate import collate
from ctrsink.sequences.windows import Cuts

FACTS = Facts(vocabulary=VOCABULARY)
ITEMS, OPINIONS = 1000, 5
_SIGNALS = ("item_id", "feedback", "previous_gap")
_OF_DECODER = ("sink", "head", "ids", "backbone")


@dataclass(frozen=True)
class Contestant:
    """A model and its layout; all of it is trained, from random weights."""

    spec: DecoderSpec | DinSpec
    layout: Layout
    groups: tuple[str, ...]


def contestant(name: str, history: int, shape: str, attention: str, sparse: dict[str, int]) -> Contestant:
    """`bridge` reads bare sinks by chunks, `ctr-sink, bare` all of them, `ctr-sink` their texts too, without inter-sink bias."""
    told: dict[str, Any] = {"signals": _SIGNALS, "rows": ITEMS + 1, "buckets": 100}
    if name == "din":
        spec = DinSpec.model_validate({"family": name, "behaviours": _SIGNALS, "target": ["item_id"], "rows": ITEMS + 1})
        return Contestant(
            spec, _layout(name, history, told | {"target_signals": ("item_id",), "target_rows": spec.rows}), spec.GROUPS
        )
    by_chunks = sparse if name == "bridge" else {}
    fields = {"backbone": {"config": shape_of(shape)}, "sinks": told, "bias": None, "attention": attention}
    spec = DecoderSpec.model_validate(fields | {"sparse": by_chunks or None})
    spoken = None if name == "ctr-sink" else 0
    return Contestant(spec, _layout(spec.family, history, told | by_chunks | {"text_history": spoken}), _OF_DECODER)


def _layout(family: str, history: int, told: dict[str, Any]) -> Layout:
    return Layout(family, "per_target", history, 1, **told)


def batch_of(found: Contestant, users: int, event_tokens: int, seed: int = 0) -> Batch:
    """A sequence of one target behind `layout.history` behaviours of each user; text and feedback take `event_tokens`."""
    chance, history = np.random.default_rng(seed), found.layout.history
    texts = Ragged.of([chance.integers(0, VOCABULARY, event_tokens - 1) for _ in range(64)])
    wording = Wording(Ragged.of([np.array([token]) for token in range(OPINIONS)]), np.empty(0, np.int64))
    made = [_events(chance, history + 1, texts) for _ in range(users)]
    one = np.ones(users, np.int64)
    cuts = Cuts(made, one, 0 * one, Ragged.of([np.array([history])] * users))
    return collate(family_of(found.spec.family).encode(cuts, found.layout, wording), np.arange(users), np.arange(users))


def _events(chance: np.random.Generator, count: int, texts: Ragged) -> Events:
    """Of one user, with long and short gaps."""
    times = 1_600_000_000 + (60 * chance.pareto(1, count)).clip(0, 10**6).astype(np.int64).cumsum()
    feedbacks = chance.integers(0, OPINIONS, count)
    return Events(
        texts=chance.integers(0, 64, count),
        feedbacks=feedbacks,
        timestamps=times,
        labels=chance.integers(0, 2, count).astype(np.int8),
        known=np.arange(count),
        tokens=texts,
        categories={"item_id": chance.integers(1, ITEMS, count), "feedback": feedbacks},
    )
