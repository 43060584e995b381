"""Pure functions from a log to shards: labels, splits, the order of users and events, where a shard ends."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ctrsink.config.data import SplitSpec
from ctrsink.dataset.arrow import pc
from ctrsink.dataset.cells import iso
from ctrsink.dataset.manifest import INDEX_SCHEMA, SPLITS, Split, SplitCounts, SplitTimes
from ctrsink.errors import InputError

NO_LABEL = -1
PAST = -1
PREFIXES = 2**16


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


def split_ranks(impressions: int, train: float, valid: float) -> list[int]:
    """Ranks, among all impressions in order of time, of the two whose times are the split times of these shares."""
    # The sum of two decimal shares falls a little below or above the number that was meant.
    return [min(math.floor(share * impressions + 1e-6), impressions - 1) for share in (train, train + valid)]


def split_of(timestamp: np.ndarray, times: SplitTimes) -> np.ndarray:
    """int8 per event: the index in SPLITS of the split that its time falls in, or PAST before them all."""
    found = np.searchsorted([times.train_end, times.valid_end], timestamp, side="right").astype(np.int8)
    return found if times.train_from is None else np.where(timestamp < times.train_from, np.int8(PAST), found)


def check_splits(counts: dict[Split, SplitCounts], spec: SplitSpec, first_time: int, last_time: int) -> None:
    """Refuse splits that nothing can be learned from, or measured on; the times are of the log's oldest and newest event.

    Raises:
        InputError: a split that was asked for has no impression, or train has one class only.
    """
    for name in SPLITS:
        if not counts[name].impressions and (name != "valid" or spec.has_valid):
            reason = "too many share one timestamp, or the log is too short for prepare.split"
            if spec.shares is None:
                reason = f"the log reaches from {iso(first_time)} to {iso(last_time)}, choose the times of prepare.split within"
            raise InputError(f"the {name} split has no impression: {reason}")
    train = counts["train"]
    if train.positives in (0, train.impressions):
        which = "positive" if train.positives else "negative"
        raise InputError(
            f"all {train.impressions} impressions of the train split are {which}: check positive_from or the label column"
        )


def duplicates(events: pa.Table) -> np.ndarray:
    """bool per event: whether one before it in `events` has the same user, item, timestamp, feedback, label and request.

    The item may be its id or its number; other columns do not count.
    """
    found = np.zeros(events.num_rows, bool)
    order, again = _equal_before(events, "user", "timestamp")
    together = np.sort(order[again | np.append(again[1:], False)])  # few: the rest need not be looked at
    order, again = _equal_before(events.take(pa.array(together)), "user", "timestamp", "item", "feedback", "label", "request")
    found[together[order]] = again
    return found


def _equal_before(events: pa.Table, *columns: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows with equal values one behind the other, as they were, int64 [N]; and whether each is equal to the one before it."""
    keys = [_codes(events.column(name)) for name in columns]
    order = np.lexsort(keys)
    again = np.arange(len(order)) > 0
    for key in keys:
        again[1:] &= key[order[1:]] == key[order[:-1]]
    return order, again


def _codes(values: pa.ChunkedArray) -> np.ndarray:
    """An integer for each value, equal where the values are; null is a value, and -0 is 0."""
    if pa.types.is_floating(values.type):
        values = pc.add(values, pa.scalar(0, values.type))
    if pa.types.is_integer(values.type) and not values.null_count:
        return values.to_numpy()
    return values.combine_chunks().dictionary_encode(null_encoding="encode").indices.to_numpy()


def prefixes(user: pa.Array) -> np.ndarray:
    """uint16 per event: the first bits of the sha256 of its user's id; users in the order of their hash come prefix by prefix."""
    encoded = user.dictionary_encode()
    firsts = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big") for name in encoded.dictionary.to_pylist()]
    return np.array(firsts, np.uint16)[encoded.indices.to_numpy()]


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


def cut_shards(events: np.ndarray, shard_events: int) -> list[tuple[int, int]]:
    """Ranges [first, end) of prefixes: a shard is closed once it holds `shard_events` events; all of them have some.

    Args:
        events: number of events of each prefix, [PREFIXES].
    """
    ends = np.cumsum(events)
    shards, first, done = [], 0, 0
    while done < ends[-1]:
        end = min(int(np.searchsorted(ends, done + shard_events, side="left")) + 1, len(events))
        if ends[end - 1] == ends[-1]:
            end = len(events)
        shards.append((first, end))
        first, done = end, int(ends[end - 1])
    return shards


def user_index(offsets: np.ndarray, split: np.ndarray, label: np.ndarray, shard: int) -> pa.Table:
    """The index (INDEX_SCHEMA) of the users of one shard.

    Args:
        offsets: of the users' events, see Chronologies.
        split: int8 per event, its index in SPLITS, or PAST.
        label: int8 per event.
        shard: number of the shard.
    """
    users, kinds = len(offsets) - 1, 1 + len(SPLITS)
    cell = np.repeat(np.arange(users), np.diff(offsets)) * kinds + split + 1  # PAST is -1
    events = np.bincount(cell, minlength=users * kinds).reshape(users, kinds)
    impressions = np.bincount(cell[label != NO_LABEL], minlength=users * kinds).reshape(users, kinds)
    columns = [np.full(users, shard), np.arange(users), *events.T, *impressions.T[1:]]
    return pa.Table.from_arrays([pa.array(c.astype(np.int32)) for c in columns], schema=INDEX_SCHEMA)


def longest_runs(lengths: np.ndarray, offsets: np.ndarray) -> tuple[int, ...]:
    """The largest sum of the lengths of 1, 2, 4, ... events in a row of one chronology, up to all of the one with most events.

    Args:
        lengths: of all events, [N].
        offsets: int [users + 1]; rows of each chronology.
    """
    total = np.append(0, lengths.cumsum(dtype=np.int64))
    counts = np.diff(offsets)
    begins, ends = np.asarray(offsets[:-1]).repeat(counts), np.arange(1, len(total))
    found: list[int] = []
    while not found or 2 ** (len(found) - 1) < counts.max():
        found.append(int((total[ends] - total[np.maximum(begins, ends - 2 ** len(found))]).max()))
    return tuple(found)
