"""The pure steps of preparation, by properties: every event once and in order, splits by time, counts, labels, texts."""

import random

import numpy as np
import pyarrow as pa
from hypothesis import assume, given
from hypothesis import strategies as st

from ctrsink.config.data import SplitSpec, TextSpec
from ctrsink.dataset import splits
from ctrsink.dataset.manifest import INDEX_SCHEMA, SPLITS
from ctrsink.dataset.splits import NO_LABEL, PAST, PREFIXES
from ctrsink.prepare.render import feedback_ids, feedback_minima, feedback_table
from ctrsink.prepare.survey import Survey, Totals, count_splits, count_times, split_times

logs = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 30)), min_size=1, max_size=80)  # user, timestamp


@given(logs)
def test_chronologies_hold_every_event_once_in_order(events: list[tuple[str, int]]) -> None:
    users, times = [u for u, _ in events], np.array([t for _, t in events])
    found = splits.chronologies(pa.array(users), times)
    assert sorted(found.order) == list(range(len(events)))
    assert sorted(found.users) == sorted(set(users))
    for number, user in enumerate(found.users):
        own = list(found.order[found.offsets[number] : found.offsets[number + 1]])
        assert own == sorted((i for i, u in enumerate(users) if u == user), key=lambda i: (times[i], i))


@given(logs, st.randoms())
def test_order_of_users_does_not_depend_on_the_log(events: list[tuple[str, int]], chance: random.Random) -> None:
    shuffled = list(events)
    chance.shuffle(shuffled)
    orders = [splits.chronologies(pa.array([u for u, _ in e]), np.array([t for _, t in e])).users for e in (events, shuffled)]
    assert orders[0] == orders[1]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40), st.integers(1, 50))
def test_shards_are_ranges_of_prefixes_with_enough_events(events: list[int], shard_events: int) -> None:
    shards = splits.cut_shards(np.array(events), shard_events)
    assert [prefix for first, end in shards for prefix in range(first, end)] == (list(range(len(events))) if sum(events) else [])
    for number, (first, end) in enumerate(shards):
        assert sum(events[first:end]) > 0
        if number < len(shards) - 1:
            assert sum(events[first : end - 1]) < shard_events <= sum(events[first:end])


@given(st.lists(st.text("abcdefgh", max_size=3), min_size=1, max_size=60))
def test_users_come_prefix_by_prefix(users: list[str]) -> None:
    ordered = splits.chronologies(pa.array(users), np.zeros(len(users))).users
    prefixes = splits.prefixes(pa.array(ordered)).tolist()
    assert prefixes == sorted(prefixes)


shares = st.tuples(st.integers(1, 98), st.integers(0, 98)).filter(lambda s: sum(s) < 100)


@given(st.lists(st.lists(st.integers(-20000, 20000), max_size=30), min_size=1, max_size=5), shares, st.randoms())
def test_splits_follow_time_and_shares(blocks: list[list[int]], share: tuple[int, int], chance: random.Random) -> None:
    """The split times found block by block are those of the whole log in order of time."""
    labels = [[chance.choice([NO_LABEL, 0, 1]) for _ in block] for block in blocks]
    surveys = [survey_of(block, label) for block, label in zip(blocks, labels, strict=True)]
    impressions = sorted(
        (t, label) for block, own in zip(blocks, labels, strict=True) for t, label in zip(block, own, strict=True) if label >= 0
    )
    assume(impressions)
    totals = Totals()
    for survey in surveys:
        totals.add(Survey.from_bytes(survey.to_bytes()))
    assert (totals.first_time, totals.last_time) == (min(t for b in blocks for t in b), max(t for b in blocks for t in b))
    spec = SplitSpec(train=share[0] / 100, valid=share[1] / 100)
    cuts = split_times(totals, lambda: iter(surveys), spec)
    ranks = [min(s * len(impressions) // 100, len(impressions) - 1) for s in (share[0], sum(share))]
    assert [cuts.train_end, cuts.valid_end] == [impressions[rank][0] for rank in ranks]
    split = splits.split_of(np.array([t for t, _ in impressions]), cuts)
    for number, counts in enumerate(count_splits(iter(surveys), cuts).values()):
        own = [label for (_, label), s in zip(impressions, split, strict=True) if s == number]
        assert (counts.impressions, counts.positives) == (len(own), sum(own))


def survey_of(times: list[int], labels: list[int]) -> Survey:
    seconds, counts = count_times(np.array(times, np.int64), np.array(labels, np.int8))
    return Survey(
        len(times), len(times), None, None, {}, np.zeros(PREFIXES, np.int64), seconds, counts, {}, None, np.zeros(1, np.int64), {}
    )


@given(logs, st.integers(0, 15), st.integers(0, 15), st.randoms())
def test_index_counts_every_event(events: list[tuple[str, int]], train_end: int, valid: int, chance: random.Random) -> None:
    times = np.array([t for _, t in events])
    found = splits.chronologies(pa.array([u for u, _ in events]), times)
    cuts = splits.SplitTimes(train_end=train_end, valid_end=train_end + valid)
    split = np.where(times[found.order] < 5, PAST, splits.split_of(times[found.order], cuts))
    label = np.array([chance.choice([NO_LABEL, 0, 1]) for _ in events], np.int8)
    index = splits.user_index(found.offsets, split, label, 7)
    assert index.schema.equals(INDEX_SCHEMA)
    assert index.column("shard").to_pylist() == [7] * len(found.users)
    assert index.column("row").to_pylist() == list(range(len(found.users)))
    for number, name in ((PAST, "past"), *enumerate(SPLITS)):
        for user, (first, end) in enumerate(zip(found.offsets, found.offsets[1:], strict=False)):
            mine = split[first:end] == number
            assert index.column(f"{name}_events")[user].as_py() == mine.sum()
            if number != PAST:
                assert index.column(f"{name}_impressions")[user].as_py() == (mine & (label[first:end] != NO_LABEL)).sum()


def test_labels_come_from_the_log_or_from_feedback() -> None:
    logged = np.array([1, 0, NO_LABEL], np.int8)
    feedback = np.array([4.0, 3.5, np.nan], np.float32)
    assert splits.labels(logged, feedback, True, 4.0).tolist() == [1, 0, NO_LABEL]
    assert splits.labels(np.full(3, NO_LABEL, np.int8), feedback, False, 4.0).tolist() == [1, 0, NO_LABEL]


@given(st.lists(st.one_of(st.none(), st.floats(-5, 5, width=32)), min_size=1, max_size=50))
def test_feedback_texts_render_each_event(feedback: list[float | None]) -> None:
    values = np.array([np.nan if f is None else f for f in feedback], np.float32)
    text = TextSpec(feedback=" {feedback:.1f}", separator=";")
    halves = [feedback_minima(text, half) for half in np.array_split(values, 2)]
    minima = {t: min(half[t] for half in halves if t in half) for half in halves for t in half}
    assert minima == feedback_minima(text, values)
    texts = feedback_table(text, (), minima)
    ids = feedback_ids(text, texts, values)
    assert list(texts[1:]) == list(dict.fromkeys(f" {f:.1f};" for f in sorted(values[~np.isnan(values)] + np.float32(0))))
    assert feedback_table(text, texts[:2], minima)[:2] == texts[:2]
    assert texts[0] == ";"
    assert len(set(texts)) == len(texts)
    assert [texts[i] for i in ids] == [";" if f is None else f" {f + 0:.1f};" for f in feedback]
