"""Pure functions from a log to shards: labels, split times, the order of users and events, where a shard ends."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ctrsink.config.data import SplitSpec
from ctrsink.data.manifest import INDEX_SCHEMA, SPLITS, Split, SplitCounts, SplitTimes
from ctrsink.errors import InputError

NO_LABEL = -1


@dataclass(frozen=True)
class Chronologies:
    """All events, user after user and oldest first; `offsets[u]:offsets[u + 1]` are those of user `u`."""

    users: list[str]
    offsets: np.ndarray  # int64, users + 1
    order: np.ndarray  # int64 per event: its row in the log


def labels(logged: np.ndarray, feedback: np.ndarray, mapped: bool, positive_from: float) -> np.ndarray:
    """The label of each event, int8: 0, 1, or NO_LABEL where it is no impression.

    It is that of the log (`logged`, int8, NO_LABEL where empty) if the log's label column is `mapped`, else whether
    `feedback` (float32, NaN where there is none) is at least `positive_from`.
    """
    if mapped:
        return logged
    return np.where(np.isnan(feedback), NO_LABEL, feedback >= positive_from).astype(np.int8)


def split_times(timestamp: np.ndarray, spec: SplitSpec) -> SplitTimes:
    """Cut the time so that about `spec.train` and `spec.valid` of the impressions lie before the cuts.

    `timestamp` holds the int64 seconds of every impression, in any order, at least one.
    """
    ordered = np.sort(timestamp)
    # The sum of two decimal shares falls a little below or above the number that was meant.
    cuts = [min(math.floor(share * len(ordered) + 1e-6), len(ordered) - 1) for share in (spec.train, spec.train + spec.valid)]
    return SplitTimes(train_end=int(ordered[cuts[0]]), valid_end=int(ordered[cuts[1]]))


def split_of(timestamp: np.ndarray, times: SplitTimes) -> np.ndarray:
    """int8 per event: the index in SPLITS of the split that its time falls in."""
    return np.searchsorted([times.train_end, times.valid_end], timestamp, side="right").astype(np.int8)


def count_splits(split: np.ndarray, label: np.ndarray, spec: SplitSpec) -> dict[Split, SplitCounts]:
    """Impressions and positives of each split.

    Raises:
        InputError: a split that was asked for has no impression, or train has one class only.
    """
    counts: dict[Split, SplitCounts] = {}
    for index, name in enumerate(SPLITS):
        chosen = label[(split == index) & (label != NO_LABEL)]
        counts[name] = SplitCounts(impressions=len(chosen), positives=int(chosen.sum()))
        if not len(chosen) and not (name == "valid" and spec.valid == 0):
            reason = "too many share one timestamp, or the log is too short for prepare.split"
            raise InputError(f"the {name} split has no impression: {reason}")
    train = counts["train"]
    if train.positives in (0, train.impressions):
        which = "positive" if train.positives else "negative"
        raise InputError(
            f"all {train.impressions} impressions of the train split are {which}: check positive_from or the label column"
        )
    return counts


def chronologies(user: pa.Array, timestamp: np.ndarray) -> Chronologies:
    """Sort by user, then time, then place in the log.

    Users come in the order of the sha256 of their id: it depends on no log order, and mixes old and new users in a shard.
    """
    encoded = user.dictionary_encode()
    names: list[str] = encoded.dictionary.to_pylist()
    by_hash = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    rank = np.empty(len(names), np.int64)
    rank[by_hash] = np.arange(len(names))
    of_event = rank[encoded.indices.to_numpy()]
    order = np.lexsort((timestamp, of_event))  # stable: ties stay in log order
    offsets = np.concatenate([[0], np.cumsum(np.bincount(of_event, minlength=len(names)))])
    return Chronologies([names[i] for i in by_hash], offsets, order)


def cut_shards(offsets: np.ndarray, shard_events: int) -> list[tuple[int, int]]:
    """Ranges [first, end) of users: a shard is closed once it holds `shard_events` events; a user is never torn apart."""
    shards = []
    first, users = 0, len(offsets) - 1
    while first < users:
        end = min(int(np.searchsorted(offsets, offsets[first] + shard_events, side="left")), users)
        shards.append((first, end))
        first = end
    return shards


def user_index(offsets: np.ndarray, split: np.ndarray, label: np.ndarray, shards: list[tuple[int, int]]) -> pa.Table:
    """The index (INDEX_SCHEMA) of users in shard order; `split` and `label` are per event, in the order of chronologies."""
    users = len(offsets) - 1
    cell = np.repeat(np.arange(users), np.diff(offsets)) * len(SPLITS) + split
    events = np.bincount(cell, minlength=users * len(SPLITS)).reshape(users, len(SPLITS))
    impressions = np.bincount(cell[label != NO_LABEL], minlength=users * len(SPLITS)).reshape(users, len(SPLITS))
    shard = np.concatenate([np.full(end - first, i) for i, (first, end) in enumerate(shards)])
    row = np.concatenate([np.arange(end - first) for first, end in shards])
    columns = [shard, row, np.zeros(users), *events.T, *impressions.T]
    return pa.Table.from_arrays([pa.array(c.astype(np.int32)) for c in columns], schema=INDEX_SCHEMA)
