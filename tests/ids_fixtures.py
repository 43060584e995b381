"""Sequences of ids and signals, for the families that read no text."""

import dataclasses
from typing import Any

import numpy as np

from ctrsink.config.model import SparseSpec
from ctrsink.config.model.ids import IdsSpec
from ctrsink.dataset.events import Events, UserEvents
from ctrsink.dataset.layout import Layout
from ctrsink.families.facts import Facts, Wording
from ctrsink.families.registry import family_of
from ctrsink.features.categories import categories
from ctrsink.features.ragged import Ragged
from ctrsink.features.registry import of_kind
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.columns import Sequences
from ctrsink.sequences.windows import Cuts
from tests.builders import TEXTS, batch_of

NO_WORDS = Wording(Ragged.of([np.zeros(0, np.int64)]), np.zeros(0, np.int64))
FACTS = Facts(vocabulary=97)
SIGNALS = {"behaviours": ("item_id", "feedback", "previous_gap", "deviation"), "target": ("item_id", "hour", "item_mean")}
FORMS = ("per_target", "per_request", "per_user")


def ids_layout(spec: IdsSpec, examples: Any, history: int = 6, targets: int = 3) -> Layout:
    """The layout of a model, as its family would make it."""
    found = Layout(
        family=spec.family,  # pyright: ignore[reportAttributeAccessIssue]
        examples=examples,
        history=history,
        targets=1 if examples == "per_target" else targets,
        signals=of_kind(spec.behaviours, numbers=False),
        buckets=spec.buckets,
        rows=spec.rows,
        numbers=of_kind(spec.behaviours, numbers=True),
        target_signals=of_kind(spec.target, numbers=False),
        target_rows=spec.rows,
        target_numbers=of_kind(spec.target, numbers=True),
    )
    return dataclasses.replace(found, chunks=spec.chunks, chunking=spec.chunking) if isinstance(spec, SparseSpec) else found


def ids_sequence(chronology: UserEvents, targets: np.ndarray, layout: Layout) -> Sequences:
    """The sequence of `targets`, numbers of events in the chronology; the item is the text's number."""
    c = chronology
    told = categories((*layout.signals, *layout.target_signals), c.timestamps, c.feedbacks, 0.0)
    events = Events(
        texts=c.texts,
        feedbacks=c.feedbacks,
        timestamps=c.timestamps,
        labels=c.labels,
        known=np.arange(len(c.texts)) if c.known is None else c.known,
        tokens=TEXTS,
        numbers=((10 * c.texts + c.feedbacks)[:, None] / 20 * np.ones(len(layout.numbers))).astype(np.float32),
        target_numbers=(c.texts[:, None] / 5 * np.ones(len(layout.target_numbers))).astype(np.float32),
        categories=told | {"item_id": c.texts},
    )
    cuts = Cuts([events], np.array([1]), np.array([0]), Ragged.of([targets]))
    return family_of(layout.family).encode(cuts, layout, NO_WORDS)


def chosen(chronology: UserEvents, examples: str, targets: int = 3) -> tuple[UserEvents, np.ndarray]:
    """The last impressions of a chronology as targets; in `per_request` they were shown at one moment."""
    count = len(chronology.texts)
    first = max(0, count - (1 if examples == "per_target" else targets))
    if examples == "per_request":
        numbers = np.arange(count)
        known = np.where(numbers >= first, first, numbers)
        chronology = dataclasses.replace(chronology, known=known, timestamps=chronology.timestamps[known])
    return chronology, np.arange(first, count)


def ids_batch(spec: IdsSpec, examples: str, chronologies: list[UserEvents], history: int = 6) -> Batch:
    """A sequence of each chronology's last impressions."""
    layout = ids_layout(spec, examples, history)
    return batch_of([ids_sequence(*chosen(chronology, examples), layout) for chronology in chronologies])
