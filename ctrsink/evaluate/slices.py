"""Where a model is good and where not: what is known of each impression, and the groups that this makes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import pyarrow as pa

from ctrsink.dataset.reader import Dataset

DAY = 86_400
PARTS = 10
"""Groups of neighbouring values, at most: of a log of years several days are one group."""
HISTORY = (0, 10, 20, 50, 100, 200)
POPULARITY = (0, 1, 10, 100, 1000)
"""Least values of the groups."""
SINCE = {"the same second": 0, "a minute": 60, "an hour": 3600, "a day": DAY}
"""Greatest values of the groups, seconds."""


@dataclass(frozen=True)
class Facts:
    """What is known of N impressions of a split, apart from any model."""

    users: pa.Array
    """Ids, [N]."""
    events: np.ndarray
    """int64 [N]; number of the event in the user's chronology."""
    labels: np.ndarray
    """int8 [N]."""
    history: np.ndarray
    """Behaviours of the user that were known, [N]."""
    since: np.ndarray
    """Seconds since the latest of them, [N]; -1 where there is none."""
    item_events: np.ndarray
    """Events of the item in the training range, [N]."""
    user_impressions: np.ndarray
    """Impressions of the user in the training range, [N]."""
    times: np.ndarray
    """Seconds since 1970, [N]."""


def facts(dataset: Dataset, split: str) -> Facts:
    """Of every impression of the split in the data set's newest part, which is what models are measured on."""
    item_events = np.zeros(dataset.manifest.item_count, np.int64)
    trained: dict[str, int] = {}
    columns: list[tuple[np.ndarray, ...]] = []
    names: list[np.ndarray] = []
    for number in range(len(dataset.manifest.shards)):
        shard = dataset.shard(number)
        owners = np.arange(len(shard.users)).repeat(np.diff(shard.offsets))
        in_train = dataset.within(number, "train")
        item_events += np.bincount(shard.items[in_train], minlength=len(item_events))
        impressions = np.bincount(owners[in_train & (shard.labels >= 0)], minlength=len(shard.users))
        for user in np.flatnonzero(impressions):
            trained[shard.users[user]] = trained.get(shard.users[user], 0) + int(impressions[user])
        if number in dataset.newest:
            rows = np.flatnonzero(dataset.within(number, split) & (shard.labels >= 0))
            names.append(shard.users[owners[rows]])
            events = rows - shard.offsets[owners[rows]]
            known, times = shard.known[rows], shard.timestamps[rows]
            since = np.where(known > 0, times - shard.timestamps[shard.offsets[owners[rows]] + np.maximum(known, 1) - 1], -1)
            columns.append((events, shard.labels[rows], known, since, shard.items[rows], times))
    users = np.concatenate(names)
    events, labels, history, since, items, times = (np.concatenate(column) for column in zip(*columns, strict=True))
    seen = np.array([trained.get(user, 0) for user in users.tolist()], np.int64)
    return Facts(pa.array(users.tolist(), pa.string()), events, labels, history, since, item_events[items], seen, times)


@dataclass(frozen=True)
class Grouping:
    """One way to divide the impressions: the names of its groups, and the group of each impression, [N]."""

    names: tuple[str, ...]
    groups: np.ndarray


def groupings(found: Facts) -> dict[str, Grouping]:
    """By what is known of the history, popularity of the item (its events; tenths of the impressions), user, item and time."""
    return {
        "history": _by_least(found.history, HISTORY),
        "since the last behaviour": _since(found.since),
        "popularity": _by_least(found.item_events, POPULARITY),
        "popularity decile": by_value(found.item_events),
        "user": Grouping(("seen in training", "new"), (found.user_impressions == 0).astype(np.int64)),
        "item": Grouping(("seen in training", "new"), (found.item_events == 0).astype(np.int64)),
        "day": by_day(found.times),
    }


def _by_least(values: np.ndarray, least: Sequence[int]) -> Grouping:
    names = [f"{a:,}" if a == b - 1 else f"{a:,} to {b - 1:,}" for a, b in pairwise(least)]
    return Grouping((*names, f"{least[-1]:,} and more"), np.searchsorted(least, values, side="right") - 1)


def _since(seconds: np.ndarray) -> Grouping:
    """Where people act on lists at once, what they did a moment before tells most."""
    names = ("none before", *(name if name.startswith("the") else f"up to {name}" for name in SINCE), "more than a day")
    return Grouping(names, np.where(seconds < 0, 0, 1 + np.searchsorted(list(SINCE.values()), seconds)))


def by_day(times: np.ndarray) -> Grouping:
    """Days (UTC), or groups of neighbouring ones; see by_value.

    Args:
        times: seconds since 1970, [N] with N > 0.
    """
    return by_value(times // DAY, lambda day: datetime.fromtimestamp(day * DAY, UTC).date().isoformat())


def by_value(values: np.ndarray, name: Callable[[int], str] = "{:,}".format) -> Grouping:
    """Each value, or at most PARTS groups of neighbouring values with about as many impressions each.

    Args:
        values: whole numbers, [N] with N > 0.
        name: of a value.
    """
    found, of, counts = np.unique(values, return_inverse=True, return_counts=True)
    middles = np.cumsum(counts) - counts / 2
    group = np.arange(len(found)) if len(found) <= PARTS else (middles * PARTS / len(values)).astype(np.int64)
    _, group = np.unique(group, return_inverse=True)  # a value with very many leaves a group without any
    firsts = found[np.searchsorted(group, np.arange(group[-1] + 1))].tolist()
    lasts = found[np.searchsorted(group, np.arange(group[-1] + 1), side="right") - 1].tolist()
    names = [name(a) if a == b else f"{name(a)} to {name(b)}" for a, b in zip(firsts, lasts, strict=True)]
    return Grouping(tuple(names), group[of])
