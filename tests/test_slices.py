"""Slices of the impressions: what is known of each, against a plain walk over the log; groups are a division."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrsink.dataset.reader import Dataset
from ctrsink.dataset.signal_tables import signal_columns
from ctrsink.evaluate.baselines import smoothed_item_mean
from ctrsink.evaluate.prediction_file import names_of
from ctrsink.evaluate.slices import DAY, by_day, by_value, facts, groupings
from ctrsink.prepare.build import append, prepare
from tests.builders import make_dataset
from tests.prepared_in_tasks import HALF, ROWS, spec_of, write_log
from tests.runs import prepared_data


def walk(dataset: Dataset, split: str) -> dict[tuple[str, int], tuple[int, int, int, int, int]]:
    """User and event -> label, history, events of the item and impressions of the user in training, time; one event at a time."""
    rows, items, users, newest = {}, [], [], len(dataset.manifest.parts) - 1
    for user in range(len(dataset.index["row"])):
        shard, row = dataset.locate(user)
        first, name = shard.offsets[row], shard.users[row]
        lo, hi = dataset.events("train", user)
        items += shard.items[first + lo : first + hi].tolist()
        users += [name for event in range(lo, hi) if shard.labels[first + event] >= 0]
        part = dataset.manifest.shards[int(dataset.index["shard"][user])].part
        for event in range(*dataset.events(split, user)):
            at = first + event
            if shard.labels[at] >= 0 and part == newest:
                rows[name, event] = (shard.labels[at], shard.known[at], shard.items[at], name, shard.timestamps[at])
    return {
        key: (int(label), int(known), items.count(item), users.count(name), int(at))
        for key, (label, known, item, name, at) in rows.items()
    }


def appended_data(folder: Path) -> str:
    """A data set of two parts, some of whose users are in both."""
    prepare(spec_of(write_log(folder / "a.csv", ROWS[:HALF])), str(folder / "data"))
    append(spec_of(write_log(folder / "b.csv", ROWS[HALF:]), past_events=3), str(folder / "data"))
    return str(folder / "data")


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_facts_of_impressions_equal_a_plain_walk(tmp_path: Path, split: str) -> None:
    for data in (make_dataset(tmp_path / "one"), prepared_data(str(tmp_path / "two")), appended_data(tmp_path)):
        dataset = Dataset(data, keep_shards=1)
        found = facts(dataset, split)
        values = zip(found.labels, found.history, found.item_events, found.user_impressions, found.times, strict=True)
        keys = zip(found.users.to_pylist(), found.events.tolist(), strict=True)
        assert {key: tuple(map(int, row)) for key, row in zip(keys, values, strict=True)} == walk(dataset, split)
        assert len(found.labels) == dataset.manifest.parts[-1].splits[split].impressions  # pyright: ignore[reportArgumentType]


def test_the_item_mean_predicts_what_models_are_measured_on_and_learns_from_all_parts(tmp_path: Path) -> None:
    dataset = Dataset(appended_data(tmp_path))
    found, shown = smoothed_item_mean(dataset, "test"), facts(dataset, "test")
    keys = set(zip(names_of(dataset, found.users).to_pylist(), found.events.tolist(), strict=True))
    assert keys == set(zip(shown.users.to_pylist(), shown.events.tolist(), strict=True))
    assert len(keys) == len(found.events) == dataset.manifest.parts[-1].splits["test"].impressions
    liked = {"all": [0, 0]} | {str(item): [0, 0] for item in range(dataset.manifest.item_count)}
    for user in range(dataset.manifest.users):
        shard, row = dataset.locate(user)
        for event in range(*dataset.events("train", user)):
            at = shard.offsets[row] + event
            for name in ("all", str(shard.items[at])) if shard.labels[at] >= 0 else ():
                liked[name] = [liked[name][0] + int(shard.labels[at]), liked[name][1] + 1]
    overall = liked["all"][0] / liked["all"][1]
    shard, row = dataset.locate(int(found.users[0]))
    positives, count = liked[str(shard.items[shard.offsets[row] + found.events[0]])]
    assert found.probabilities[0] == pytest.approx((positives + 5 * overall) / (count + 5))


def test_every_grouping_gives_each_impression_one_group_that_says_what_it_is(tmp_path: Path) -> None:
    found = facts(Dataset(make_dataset(tmp_path)), "test")
    made = groupings(found)
    assert list(made) == ["history", "since the last behaviour", "popularity", "popularity decile", "user", "item", "day"]
    for grouping in made.values():
        assert len(grouping.groups) == len(found.labels)
        assert 0 <= grouping.groups.min() <= grouping.groups.max() < len(grouping.names)
    assert np.array_equal(made["user"].groups == 1, found.user_impressions == 0)
    assert np.array_equal(made["popularity"].groups == 0, found.item_events == 0)
    assert np.array_equal(made["item"].groups == 1, found.item_events == 0)
    assert made["history"].names == ("0 to 9", "10 to 19", "20 to 49", "50 to 99", "100 to 199", "200 and more")
    assert np.array_equal(made["history"].groups == 1, (found.history >= 10) & (found.history < 20))
    assert made["popularity"].names[0] == "0"
    since = made["since the last behaviour"]
    assert since.names[:3] == ("none before", "the same second", "up to a minute")
    assert np.array_equal(since.groups == 0, found.history == 0)
    assert np.array_equal(since.groups <= 3, found.since <= 3600)


def test_the_time_since_the_last_behaviour_is_that_to_the_latest_known_one(tmp_path: Path) -> None:
    dataset = Dataset(make_dataset(tmp_path))
    found = facts(dataset, "test")
    seen: dict[tuple[str, int], int] = {}
    for number in range(len(dataset.manifest.shards)):
        shard = dataset.shard(number)
        for row, user in enumerate(shard.users):
            times = shard.timestamps[shard.offsets[row] : shard.offsets[row + 1]].tolist()
            for event, known in enumerate(shard.known[shard.offsets[row] : shard.offsets[row + 1]].tolist()):
                seen[str(user), event] = times[event] - times[known - 1] if known else -1
    keys = zip(found.users.to_pylist(), found.events.tolist(), strict=True)
    assert found.since.tolist() == [seen[key] for key in keys]
    assert found.since.max() > 0


@given(st.lists(st.integers(0, 60 * DAY), min_size=1, max_size=200))
def test_days_are_grouped_whole_and_in_order(times: list[int]) -> None:
    at = np.array(times)
    found = by_day(at)
    days = at // DAY
    assert len(found.names) == found.groups.max() + 1 <= 10
    order = np.argsort(days)
    assert (np.diff(found.groups[order]) >= 0).all()
    assert all(len(set(found.groups[days == day].tolist())) == 1 for day in set(days.tolist()))
    if len(set(days.tolist())) <= 10:
        assert len(found.names) == len(set(days.tolist()))


def test_a_group_of_days_is_named_by_its_first_and_last() -> None:
    assert by_day(np.array([0, 10, DAY])).names == ("1970-01-01", "1970-01-02")
    found = by_day(np.arange(40) * DAY)
    assert found.names[0] == "1970-01-01 to 1970-01-04"
    assert np.bincount(found.groups).tolist() == [4] * 10


def test_items_are_grouped_by_tenths_of_the_impressions() -> None:
    shown = np.repeat([0, 7, 20, 3000], [5, 5, 4, 6])
    assert by_value(shown).names == ("0", "7", "20", "3,000")
    found = by_value(np.arange(40))
    assert found.names[:2] == ("0 to 3", "4 to 7")
    assert np.bincount(found.groups).tolist() == [4] * 10


@pytest.mark.parametrize("split", ["valid", "test"])
def test_signals_are_of_what_models_are_measured_on(tmp_path: Path, split: str) -> None:
    """(user, event) is told apart within a part alone: those of older parts would be taken for others."""
    for data in (appended_data(tmp_path / "two"), make_dataset(tmp_path / "one")):
        dataset = Dataset(data)
        found, shown = signal_columns(dataset), facts(dataset, split)
        keys = zip(shown.users.to_pylist(), shown.events.tolist(), shown.times.tolist(), shown.labels.tolist(), strict=True)
        rows = found[split].select(["user", "event", "timestamp", "label"]).to_pylist()
        assert sorted(tuple(row.values()) for row in rows) == sorted(keys)
        parts = dataset.manifest.parts
        assert found["train"].num_rows == sum(part.splits["train"].impressions for part in parts)
