"""Slices of the impressions: what is known of each, against a plain walk over the log; groups are a division."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrsink.data.dataset import Dataset
from ctrsink.evaluate.slices import DAY, by_day, facts, groupings
from tests.builders import make_dataset
from tests.runs import prepared_data


def walk(dataset: Dataset, split: str) -> dict[tuple[str, int], tuple[int, int, int, int, int]]:
    """User and event -> label, history, events of the item and impressions of the user in training, time; one event at a time."""
    rows, items, users = {}, [], []
    for user in range(len(dataset.index["row"])):
        shard, row = dataset.locate(user)
        first, name = shard.offsets[row], shard.users[row]
        lo, hi = dataset.events("train", user)
        items += shard.items[first + lo : first + hi].tolist()
        users += [name for event in range(lo, hi) if shard.labels[first + event] >= 0]
        for event in range(*dataset.events(split, user)):
            at = first + event
            if shard.labels[at] >= 0:
                rows[name, event] = (shard.labels[at], shard.known[at], shard.items[at], name, shard.timestamps[at])
    return {
        key: (int(label), int(known), items.count(item), users.count(name), int(at))
        for key, (label, known, item, name, at) in rows.items()
    }


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_facts_of_impressions_equal_a_plain_walk(tmp_path: Path, split: str) -> None:
    for data in (make_dataset(tmp_path), prepared_data(str(tmp_path / "requests"))):
        dataset = Dataset(data, keep_shards=1)
        found = facts(dataset, split)
        values = zip(found.labels, found.history, found.item_events, found.user_impressions, found.times, strict=True)
        keys = zip(found.users.to_pylist(), found.events.tolist(), strict=True)
        assert {key: tuple(map(int, row)) for key, row in zip(keys, values, strict=True)} == walk(dataset, split)
        assert len(found.labels) == dataset.manifest.splits[split].impressions  # pyright: ignore[reportArgumentType]


def test_every_grouping_gives_each_impression_one_group_that_says_what_it_is(tmp_path: Path) -> None:
    found = facts(Dataset(make_dataset(tmp_path)), "test")
    made = groupings(found)
    assert list(made) == ["history", "popularity", "user", "item", "day"]
    for grouping in made.values():
        assert len(grouping.groups) == len(found.labels)
        assert 0 <= grouping.groups.min() <= grouping.groups.max() < len(grouping.names)
    assert np.array_equal(made["user"].groups == 1, found.user_impressions == 0)
    assert np.array_equal(made["popularity"].groups == 0, found.item_events == 0)
    assert np.array_equal(made["item"].groups == 1, found.item_events == 0)
    assert made["history"].names == ("0 to 9", "10 to 19", "20 to 49", "50 to 99", "100 to 199", "200 and more")
    assert np.array_equal(made["history"].groups == 1, (found.history >= 10) & (found.history < 20))
    assert made["popularity"].names[0] == "0"


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
    found = by_day(np.arange(40) * DAY, periods=4)
    assert found.names[0] == "1970-01-01 to 1970-01-10"
    assert np.bincount(found.groups).tolist() == [10, 10, 10, 10]
