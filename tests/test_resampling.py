"""Metrics over draws of users, and intervals, against their plain definitions."""

import math
import time
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t
from sklearn.metrics import log_loss, roc_auc_score

from ctrsink.evaluate.intervals import by_draws, by_seeds, deviation
from ctrsink.evaluate.metrics import auc, gauc
from ctrsink.evaluate.resampling import Resampled, draws

USERS = 4
# Few distinct scores: ties are the rule.
impression = st.tuples(st.integers(0, 1), st.integers(1, 9), st.integers(0, USERS - 1))
tables = st.lists(impression, min_size=1, max_size=40)
weightings = st.lists(st.integers(0, 3), min_size=USERS, max_size=USERS)


def columns(table: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels, scores, users = (np.array(column) for column in zip(*table, strict=True))
    return labels.astype(np.int8), scores / 10, users


@given(tables, weightings)
def test_a_draw_weighs_impressions_as_sklearn_does(table: list[tuple[int, int, int]], weights: list[int]) -> None:
    labels, scores, users = columns(table)
    found = Resampled(labels, scores, users, USERS).over(np.array([weights], np.uint8))
    weight = np.array(weights)[users]
    if len(set(labels[weight > 0].tolist())) == 2:
        assert found["auc"][0] == pytest.approx(roc_auc_score(labels, scores, sample_weight=weight), abs=1e-12)
    else:
        assert math.isnan(found["auc"][0])
    if weight.any():
        expected = log_loss(labels, scores, sample_weight=weight, labels=[0, 1])
        assert found["logloss"][0] == pytest.approx(expected, rel=1e-9)
    else:
        assert math.isnan(found["logloss"][0])


@given(tables, weightings)
def test_a_user_drawn_twice_counts_as_two_users(table: list[tuple[int, int, int]], weights: list[int]) -> None:
    labels, scores, users = columns(table)
    rows = [(row, copy) for row, user in enumerate(users) for copy in range(weights[user])]
    found = Resampled(labels, scores, users, USERS).over(np.array([weights], np.uint8))
    if not rows:
        assert all(math.isnan(values[0]) for values in found.values())
        return
    taken, copies = np.array(rows).T
    expected = gauc(labels[taken], scores[taken], users[taken] * 10 + copies)
    assert found["gauc"][0] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert found["auc"][0] == pytest.approx(auc(labels[taken], scores[taken]), abs=1e-12, nan_ok=True)


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 5))
def test_a_draw_has_as_many_users_as_there_are(users: int, times: int, seed: int) -> None:
    found = draws(users, times, seed)
    assert found.shape == (times, users)
    assert (found.sum(axis=1, dtype=np.int64) == users).all()
    assert np.array_equal(found, draws(users, times, seed))


def test_draws_hit_every_user_alike() -> None:
    found = draws(50, 20_000).astype(np.float64)
    assert np.abs(found.mean(axis=0) - 1).max() < 0.04
    assert found.var() == pytest.approx(1 - 1 / 50, abs=0.02)  # binomial with n = 50 and p = 1 / 50


def test_a_thousand_draws_of_a_hundred_thousand_impressions_take_seconds() -> None:
    chance = np.random.default_rng(0)
    users, labels = np.sort(chance.integers(0, 2000, 100_000)), chance.integers(0, 2, 100_000)
    started = time.process_time()
    found = Resampled(labels, chance.random(100_000), users, 2000).over(draws(2000, 1000))
    assert time.process_time() - started < 20
    assert found["auc"].std() < 0.01


def test_the_interval_by_users_holds_the_truth_as_often_as_it_says() -> None:
    """Users differ in their level: an interval that took impressions for independent would be far too short."""
    chance = np.random.default_rng(3)
    hits, lengths, naive = 0, [], []
    for _ in range(200):
        rates = chance.beta(1, 1, 60).repeat(30)
        users, labels = np.arange(60).repeat(30), (chance.random(1800) < rates).astype(np.int8)
        # The loss of a constant other than one half depends on the users drawn.
        losses = Resampled(labels, np.full(1800, 0.8), users, 60).over(draws(60, 200))["logloss"]
        interval = by_draws(losses)
        assert interval is not None
        hits += interval[0] <= -(math.log(0.8) + math.log(0.2)) / 2 <= interval[1]
        lengths.append(interval[1] - interval[0])
        naive.append(2 * 1.96 * np.where(labels > 0, -math.log(0.8), -math.log(0.2)).std() / math.sqrt(1800))
    assert 0.9 < hits / 200 < 0.99
    assert np.mean(lengths) > 2 * np.mean(naive)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_the_interval_by_seeds_is_students(values: list[float]) -> None:
    found = by_seeds(values)
    spread = np.std(values, ddof=1) / math.sqrt(len(values))
    assert deviation(values) == pytest.approx(np.std(values, ddof=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's own of a spread of 0
        expected = t.interval(0.95, len(values) - 1, np.mean(values), spread) if spread else (np.mean(values),) * 2
    assert found == pytest.approx(expected, abs=1e-9)


def test_one_seed_has_no_interval_and_no_deviation() -> None:
    assert by_seeds([0.7]) is None
    assert math.isnan(deviation([0.7]))


def test_draws_without_a_value_are_left_out_of_the_interval() -> None:
    assert by_draws(np.array([np.nan, 1.0, np.nan, 1.0])) == (1.0, 1.0)
    assert by_draws(np.array([np.nan])) is None
    assert by_draws(np.arange(1001.0)) == pytest.approx((25, 975))
