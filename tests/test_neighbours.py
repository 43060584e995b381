"""The item-item table against dense sums; and that it does not tell in training what the user is going to answer."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink import storage
from ctrsink.dataset.arrow import to_ipc, to_parquet
from ctrsink.dataset.shard import read_neighbours
from ctrsink.evaluate.metrics import auc
from ctrsink.features import neighbours as features
from ctrsink.features.histories import Histories
from ctrsink.features.neighbours import Neighbours
from ctrsink.features.user import affinity
from ctrsink.prepare import neighbours
from ctrsink.prepare.neighbours import Pairing, cut_items, mean_square, opinions

ITEMS = 12


def log(chance: np.random.Generator, users: int, items: int, events: int, labels: np.ndarray | None = None) -> Histories:
    """Users with `events` events each; ratings of 0 or 1, the first two thirds of them counted."""
    count = users * events
    begins = np.repeat(np.arange(users) * events, events)
    outcome = chance.integers(0, 2, count) if labels is None else labels
    return Histories(
        begins=begins,
        known=np.arange(count) - begins,
        timestamps=np.tile(np.arange(events), users),
        outcome=outcome.astype(float),
        labels=outcome.astype(np.int8),
        item_mean=np.full(count, 0.5),
        item_count=np.zeros(count),
        items=chance.integers(0, items, count),
        counted=np.tile(np.arange(events) < events * 2 // 3, users),
        inside=np.tile(np.arange(events) < events * 2 // 3, users),
    )


def build(folder: Path, shards: list[Histories], items: int, partners: int) -> Neighbours:
    files = []
    for number, shard in enumerate(shards):
        files.append(str(folder / f"{number}.opinions"))
        storage.write_bytes(files[-1], to_ipc(opinions(shard)))
    task = Pairing(str(folder / "pairs"), tuple(files), items, cut_items(tuple(files), items), partners)
    tables = [task.result(task(number)) for number in range(len(task.ranges))]
    return read_neighbours(to_parquet(pa.concat_tables(tables).combine_chunks()), mean_square(tuple(files)), 20.0)


def dense(shards: list[Histories], items: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Sums and numbers of common users of all pairs of items, and the mean square."""
    sums, common, squares = np.zeros((items, items)), np.zeros((items, items), int), []
    for h in shards:
        assert h.items is not None
        assert h.counted is not None
        squares.append(h.beyond_user[h.counted] ** 2)
        for begin in np.unique(h.begins):
            rows = (h.begins == begin) & h.counted
            own = np.bincount(h.items[rows], h.beyond_user[rows], items)
            has = np.bincount(h.items[rows], minlength=items) > 0
            sums += own[:, None] * own
            common += has[:, None] & has
    return sums, common, float(np.concatenate(squares).mean())


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, ITEMS), st.sampled_from([0, ITEMS]), st.sampled_from([1, 10**6]))
def test_pairs_are_the_sums_over_common_users(seed: int, partners: int, dense_items: int, batch: int) -> None:
    chance = np.random.default_rng(seed)
    shards = [log(chance, 5, ITEMS, 9), log(chance, 4, ITEMS, 9)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_DENSE", dense_items)
        patch.setattr(neighbours, "PAIRS", 40)  # several tasks
        patch.setattr(neighbours, "BATCH", batch)  # a sum for each shard, or one
        found = build(Path(folder), shards, ITEMS, partners)
        pairs = np.repeat(np.arange(ITEMS), ITEMS), np.tile(np.arange(ITEMS), ITEMS)
        rows, places = found.find(*pairs)
    assert found.partners[places].tolist() == pairs[1][rows].tolist()
    assert len(rows) == len(found.partners)
    sums, common, variance = dense(shards, ITEMS)
    assert found.variance == pytest.approx(variance)
    for item in range(ITEMS):
        rows = slice(found.offsets[item], found.offsets[item + 1])
        kept = found.partners[rows].tolist()
        assert kept == sorted(kept)
        assert item not in kept
        np.testing.assert_allclose(found.products[rows], sums[item, kept], atol=1e-5)
        assert found.common[rows].tolist() == common[item, kept].tolist()
        # The partners are those with the most common users, whatever their similarity.
        others = [o for o in range(ITEMS) if o != item and common[item, o] >= 2]
        assert len(kept) == min(partners, len(others))
        left_out = set(others) - set(kept)
        assert not left_out or max(common[item, list(left_out)]) <= min(common[item, kept])


def test_items_without_a_partner_go_by_their_texts(tmp_path: Path) -> None:
    """As similar as pairs of the table are whose texts have such a cosine; a pair of others that is not in it stays unknown."""
    chance = np.random.default_rng(3)
    table = build(tmp_path, [log(chance, 6, ITEMS - 2, 12)], ITEMS, 4)
    vectors = chance.normal(size=(ITEMS + 2, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[3] = 0  # an item whose text is unknown
    vectors = vectors.astype(np.float16)
    table = dataclasses.replace(table, by_text=table.text_line(vectors[:ITEMS]))
    cosine = vectors.astype(float) @ vectors.astype(float).T
    owners = np.repeat(np.arange(ITEMS), np.diff(table.offsets))
    places = np.arange(len(owners))
    values = table.similarity(places, np.zeros(len(owners)), np.zeros(len(owners), np.bool_))
    told = (owners != 3) & (table.partners != 3)
    slope, intercept = np.polyfit(cosine[owners, table.partners][told], values[told], 1)
    assert table.by_text is not None
    assert (table.by_text.slope, table.by_text.intercept) == pytest.approx((slope, intercept), abs=1e-4)
    # New to the log are the last two of the table, and two that it does not reach.
    h = dataclasses.replace(log(chance, 3, ITEMS + 2, 20), neighbours=table, vectors=vectors)
    assert h.items is not None
    nobody = np.zeros(len(h.items), np.bool_)
    h = dataclasses.replace(h, texts=h.items, inside=nobody, counted=nobody)
    asked, seen = np.arange(len(h.items)).repeat(5), np.tile(np.arange(5), len(h.items))
    assert h.items is not None
    found, similarity = h.similar(asked, seen)
    expected = {}
    for pair, (i, j) in enumerate(zip(h.items[asked].tolist(), h.items[seen].tolist(), strict=True)):
        rows, own = table.find(np.array([i]), np.array([j]))
        if len(rows):
            expected[pair] = float(table.similarity(own, np.zeros(1), np.zeros(1, np.bool_))[0])
        elif max(i, j) >= ITEMS - 2 and 3 not in (i, j):
            expected[pair] = intercept + slope * cosine[i, j]
    assert found.tolist() == sorted(expected)
    np.testing.assert_allclose(similarity, [expected[pair] for pair in found.tolist()], atol=2e-3)
    assert sum(value != 0 for value in expected.values()) > 20


def test_the_own_part_is_taken_out_exactly(tmp_path: Path) -> None:
    """With it the table would tell, of a user of the training range, what that user thought of both items."""
    h = log(np.random.default_rng(1), 6, ITEMS, 12)
    assert h.items is not None
    assert h.counted is not None
    table = build(tmp_path, [h], ITEMS, ITEMS)
    sums, common, variance = dense([h], ITEMS)
    for begin in np.unique(h.begins).tolist():
        rows = np.flatnonzero((h.begins == begin) & h.counted)
        own = np.bincount(h.items[rows], h.beyond_user[rows], ITEMS)
        for i in h.items[rows].tolist():
            for j in h.items[rows].tolist():
                users = common[i, j] - 1
                partner = i != j and users > 0
                expected = (sums[i, j] - own[i] * own[j]) / (variance * (users + 20)) if partner else 0
                mine = np.array([own[i] * own[j]])
                found, places = table.find(np.array([i]), np.array([j]))
                value = table.similarity(places, mine[found], np.array([True])[found])
                assert (float(value[0]) if len(found) else 0) == pytest.approx(expected, abs=1e-5)


def test_random_answers_are_not_foretold_in_the_training_range_nor_after_it(tmp_path: Path) -> None:
    """The naive form, with the user's own part left in, foretells answers of the training range that are pure chance."""
    h = log(np.random.default_rng(5), 250, 60, 60)
    assert h.counted is not None
    table = build(tmp_path, [h], 60, 60)

    def told(counted: np.ndarray) -> np.ndarray:
        return affinity(dataclasses.replace(h, neighbours=table, counted=counted))

    ours, naive = told(h.counted), told(np.zeros_like(h.counted))
    for rows in (h.counted, ~h.counted):
        assert abs(auc(h.labels[rows], ours[rows]) - 0.5) < 0.02
    assert auc(h.labels[h.counted], naive[h.counted]) > 0.55


def test_a_meeting_that_is_not_counted_knows_nothing_of_a_later_one_that_is(tmp_path: Path) -> None:
    """Users meet every item twice and think the same both times, of pure chance; only the second time is counted."""
    chance = np.random.default_rng(3)
    users, items = 200, 30
    tastes = chance.integers(0, 2, (users, items))
    orders = np.stack([np.concatenate([chance.permutation(items), chance.permutation(items)]) for _ in range(users)])
    outcome = np.take_along_axis(np.tile(tastes, 2), orders % items, 1).ravel()
    h = log(chance, users, items, 2 * items, outcome)
    counted = np.tile(np.arange(2 * items) >= items, users)
    h = dataclasses.replace(h, items=orders.ravel(), counted=counted, inside=np.ones_like(counted))
    table = build(tmp_path, [h], items, items)
    ours, naive = (affinity(dataclasses.replace(h, neighbours=table, inside=inside)) for inside in (h.inside, counted))
    assert abs(auc(h.labels[~counted], ours[~counted]) - 0.5) < 0.03
    assert auc(h.labels[~counted], naive[~counted]) > 0.55
