"""A model's predictions: made by all ranks, and brought together on the first one, user after user."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ctrsink.dist import Topology, all_sum, gather_first
from ctrsink.errors import Diverged
from ctrsink.evaluate.metrics import all_metrics
from ctrsink.families.protocol import Out
from ctrsink.sequences.batch import Batch
from ctrsink.stream.evaluation import Share

GATHERED = 64
"""Rounds of batches after which predictions go to the first rank."""
_ROW = np.dtype([("user", np.int64), ("event", np.int64), ("label", np.int8), ("probability", np.float64)])


@dataclass(frozen=True)
class Predictions:
    """N impressions of a split, ordered by user and event."""

    users: np.ndarray
    """int64 [N]; rows of the data set's index."""
    events: np.ndarray
    """int64 [N]; number of the event in the user's chronology."""
    labels: np.ndarray
    """int8 [N]."""
    probabilities: np.ndarray
    """float64 [N]."""

    def metrics(self) -> dict[str, float]:
        return all_metrics(self.labels, self.probabilities, self.users)

    @classmethod
    def together(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Parts, at least one, that follow one another."""
        names = ("users", "events", "labels", "probabilities")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def predicted(forward: Callable[[Batch], Out], share: Share, split: str, topology: Topology) -> Iterator[Predictions]:
    """Collective: on the first rank one part of the predictions after another, in order, and no user is in two of them.

    On the other ranks nothing comes, but they must go through it too. No rank holds more than the predictions of a few rounds
    and of users who are still to be seen.

    Args:
        forward: the model; called equally often on every rank.
        share: this rank's.

    Raises:
        Diverged: a prediction is not finite, on every rank: whatever is measured of such a model is no result.
    """
    own: list[np.ndarray] = []
    waiting, rounds = np.empty(0, _ROW), len(share.finished)
    for number, batch in enumerate(share.batches, start=1):
        own.append(_rows(forward, batch))
        if number % GATHERED and number < rounds:
            continue
        rows = np.concatenate(own)
        own = []
        _require_finite(rows["probability"], split, topology)
        gathered = gather_first(rows, topology)
        if gathered is None:
            continue
        waiting = np.concatenate([waiting, gathered])
        whole = waiting["user"] < share.finished[number - 1]
        rows, waiting = waiting[whole], waiting[~whole]
        rows = rows[np.lexsort((rows["event"], rows["user"]))]
        if len(rows):
            yield Predictions(*(np.ascontiguousarray(rows[name]) for name in ("user", "event", "label", "probability")))


def _rows(forward: Callable[[Batch], Out], batch: Batch) -> np.ndarray:
    with torch.no_grad():
        logits = forward(batch).logits
    assert logits is not None
    of = batch.targets
    counted = of.counted.numpy()
    rows = np.empty(int(counted.sum()), _ROW)
    columns = (of.users, of.events, of.labels, logits.cpu().double().sigmoid())
    for name, column in zip(_ROW.names or (), columns, strict=True):
        rows[name] = column.numpy()[counted]
    return rows


def _require_finite(probabilities: np.ndarray, split: str, topology: Topology) -> None:
    dead, count = all_sum([float((~np.isfinite(probabilities)).sum()), float(len(probabilities))], topology)
    if dead:
        raise Diverged(
            f"{dead:.0f} of {count:.0f} predictions on the split {split} are not finite: the model's weights have overflowed"
        )
