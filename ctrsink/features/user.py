"""Statistics of a user as of each event, over their latest events before it."""

import numpy as np

from ctrsink.features.histories import Histories
from ctrsink.features.ragged import Ragged, ranges

_PAIRS = 4_000_000  # of an event and one before it, held at a time


def user_count(h: Histories) -> np.ndarray:
    """Logarithm of one more than the outcomes in the window."""
    return np.log1p(h.total(h.has))


def recent(h: Histories, latest: int, drawn: float) -> np.ndarray:
    """Mean deviation over the `latest` events, drawn to 0 by `drawn` imagined ones."""
    return h.total(h.deviation, latest) / (h.total(h.has, latest) + drawn)


def recent_rate(h: Histories) -> np.ndarray:
    """Share of positive labels among the last ten events, drawn to a half by two imagined ones."""
    return (h.total(h.labels > 0, 10) + 1) / (h.total(h.labels >= 0, 10) + 2)


def field_res(h: Histories) -> np.ndarray:
    """What the user thought of items that share a field's value with this one, beyond their own level.

    For each value of the item the mean of `beyond_user` over the user's events with it, drawn to 0 by four imagined ones; of
    these the mean over the item's values. 0 where the item has none.
    """
    assert h.fields is not None
    fields: Ragged = h.fields
    counts = fields.lengths(np.arange(len(h.begins)))
    event = np.arange(len(h.begins)).repeat(counts)
    if not len(event):
        return np.zeros(len(h.begins))
    values, value = np.unique(fields.values, return_inverse=True)
    _, group = np.unique(h.begins[event] * len(values) + value, return_inverse=True)
    # Of one user and value, by event: what lies in a window is a stretch of it.
    size = len(h.begins) + 1
    keys = group * size + event
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    sums = np.concatenate([[0.0], np.cumsum(h.beyond_user[event[order]])])
    seen = np.concatenate([[0], np.cumsum(h.has[event[order]])])
    first, end = h.rows
    low = np.searchsorted(ordered, group * size + first[event])
    high = np.searchsorted(ordered, group * size + end[event])
    means = (sums[high] - sums[low]) / (seen[high] - seen[low] + 4)
    return np.bincount(event, means, len(h.begins)) / np.maximum(counts, 1)


def affinity(h: Histories) -> np.ndarray:
    """What the user thought so far of items like this one: deviations beyond their own level, weighted by similarity.

    `sum_j s(i, j) d_j / (sum_j |s(i, j)| + 0.3)` over the events j of the window.
    """
    assert h.neighbours is not None and h.items is not None and h.counted is not None
    first, end = h.rows
    counts = np.where(h.items >= 0, end - first, 0)
    out = np.zeros(len(h.begins))
    cuts = np.searchsorted(np.cumsum(counts), np.arange(_PAIRS, counts.sum() + _PAIRS, _PAIRS))
    start = 0
    for stop in np.unique(np.append(cuts + 1, len(counts))).tolist():
        part = slice(start, min(stop, len(counts)))
        start = part.stop
        rows = ranges(first[part], counts[part])
        event = np.arange(part.start, part.stop).repeat(counts[part])
        weights = pair_similarity(h, event, rows).astype(np.float64)
        place = event - part.start
        size = part.stop - part.start
        above = np.bincount(place, weights * h.beyond_user[rows], size)
        out[part] = above / (np.bincount(place, np.abs(weights), size) + 0.3)
    return out


def pair_similarity(h: Histories, asked: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Similarity of the items of two events of one user each, without that user's own part, float32 [P].

    Args:
        asked, seen: rows of the events [P].
    """
    assert h.neighbours is not None and h.items is not None and h.counted is not None
    both = h.counted[asked] & h.counted[seen]
    own = np.where(both, h.own[asked] * h.own[seen], 0.0)
    return h.neighbours.similarity(h.items[asked], h.items[seen], own, both)
