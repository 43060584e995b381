"""Statistics of a user as of each event, over their latest events before it."""

import numpy as np

from ctrsink.features.histories import Histories
from ctrsink.features.ragged import Ragged

_DRAWN = 0.3  # similarity of imagined events without opinion


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


def user_std(h: Histories) -> np.ndarray:
    """Root mean square of the user's deviations in the window, drawn to 0 by one imagined one."""
    return np.sqrt(h.total(np.square(h.deviation)) / (h.total(h.has) + 1))


def affinity(h: Histories) -> np.ndarray:
    """What the user thought so far of items like this one: deviations beyond their own level, weighted by similarity.

    `sum_j s(i, j) d_j / (sum_j |s(i, j)| + 0.3)` over the events j of the window.
    """
    return h.alike.opinion / (h.alike.weight + _DRAWN)


def affinity_rate(h: Histories) -> np.ndarray:
    """As affinity, of positive labels in place of deviations."""
    return h.alike.positive / (h.alike.weight + _DRAWN)


def familiarity(h: Histories) -> np.ndarray:
    """How much the user met so far that is like this item: logarithm of one more than ten times `sum_j |s(i, j)|`."""
    return np.log1p(10 * h.alike.weight)
