"""Metrics against other implementations and against what must not change them."""

import math
import time
import warnings

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from ctrsink import strict_json
from ctrsink.evaluate.metrics import (
    all_metrics,
    auc,
    calibration_error,
    gauc,
    logloss,
    no_better_than_the_mean,
    normalised_entropy,
    user_metrics,
)

NAMES = {"auc", "gauc", "uauc", "uauc_two", "logloss", "normalised_entropy", "calibration_error"}

# Few distinct scores: ties are the rule.
rows = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=40)


def split(table: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels, scores, users = (np.array(c) for c in zip(*table, strict=True))
    return labels.astype(np.int8), scores / 10, users


def pairwise_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    pairs = [(p > n) + (p == n) / 2 for p in scores[labels == 1] for n in scores[labels == 0]]
    return float(np.mean(pairs))


@given(rows)
def test_auc_counts_pairs_with_ties_half(table: list[tuple[int, int, int]]) -> None:
    labels, scores, _ = split(table)
    if len(set(labels.tolist())) == 1:
        assert math.isnan(auc(labels, scores))
    else:
        assert auc(labels, scores) == pytest.approx(pairwise_auc(labels, scores), abs=1e-12)
        assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@given(rows)
def test_auc_depends_on_the_order_of_scores_only(table: list[tuple[int, int, int]]) -> None:
    labels, scores, _ = split(table)
    assume(len(set(labels.tolist())) == 2)
    value = auc(labels, scores)
    assert auc(labels, np.exp(5 * scores) - 3) == pytest.approx(value, abs=1e-12)
    assert auc(labels, -scores) == pytest.approx(1 - value, abs=1e-12)
    assert auc(1 - labels, scores) == pytest.approx(1 - value, abs=1e-12)


def test_auc_of_many_continuous_scores_equals_sklearn() -> None:
    chance = np.random.default_rng(0)
    scores = chance.normal(size=20_000)
    labels = (chance.random(20_000) < 1 / (1 + np.exp(-scores))).astype(np.int8)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert auc(labels, np.full(20_000, 0.3)) == 0.5
    assert auc(labels, labels.astype(float)) == 1.0


@given(rows)
def test_gauc_is_the_weighted_mean_over_users(table: list[tuple[int, int, int]]) -> None:
    labels, scores, users = split(table)
    values, weights = [], []
    for user in set(users.tolist()):
        mine = users == user
        if len(set(labels[mine].tolist())) == 2:
            values.append(pairwise_auc(labels[mine], scores[mine]))
            weights.append(int(mine.sum()))
    found = gauc(labels, scores, users)
    if values:
        assert found == pytest.approx(np.average(values, weights=weights), abs=1e-12)
    else:
        assert math.isnan(found)


@given(rows)
def test_the_unweighted_forms_equal_a_loop_over_the_users_they_keep(table: list[tuple[int, int, int]]) -> None:
    labels, scores, users = split(table)
    kept: dict[int, list[float]] = {1: [], 2: []}
    for user in set(users.tolist()):
        mine = users == user
        for least, values in kept.items():
            if min((labels[mine] == 1).sum(), (labels[mine] == 0).sum()) >= least:
                values.append(pairwise_auc(labels[mine], scores[mine]))
    found = user_metrics(labels, scores, users)
    assert (found["users"], found["users_two"]) == (len(kept[1]), len(kept[2]))
    for name, values in (("uauc", kept[1]), ("uauc_two", kept[2])):
        assert found[name] == pytest.approx(np.mean(values) if values else math.nan, abs=1e-12, nan_ok=True)


def test_the_three_forms_differ_and_constant_scores_count_a_half() -> None:
    labels = np.concatenate([[1, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1], [1, 0, 1, 0]])
    scores = np.concatenate([[0.2, 0.9], [0.9, 0.8, 0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3], [0.5] * 4])
    users = np.repeat(["one each", "sorted", "positive only", "constant"], [2, 6, 3, 4])
    found = user_metrics(labels, scores, users)
    assert found == {
        "gauc": pytest.approx((2 * 0.0 + 6 * 1.0 + 4 * 0.5) / 12),
        "uauc": pytest.approx((0.0 + 1.0 + 0.5) / 3),
        "users": 3,
        "uauc_two": pytest.approx((1.0 + 0.5) / 2),
        "users_two": 2,
    }


def test_by_user_metrics_of_a_million_users_take_seconds() -> None:
    """One call of `auc` for each user takes most of a minute."""
    chance = np.random.default_rng(0)
    labels, scores = chance.integers(0, 2, 3_000_000), chance.random(3_000_000)
    users = chance.integers(0, 1_000_000, 3_000_000)
    began = time.process_time()
    found = user_metrics(labels, scores, users)
    assert time.process_time() - began < 8
    assert found["users"] > 500_000
    assert found["uauc"] == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(table=rows, place=st.integers(0, 39))
def test_what_is_measured_of_a_prediction_that_is_not_finite_is_null(
    bad: float, table: list[tuple[int, int, int]], place: int
) -> None:
    labels, scores, users = split(table)
    scores[place % len(scores)] = bad
    found = all_metrics(labels, scores, users)
    assert {name for name, value in found.items() if not math.isnan(value)} == {"impressions"}
    assert math.isnan(auc(labels, scores))
    assert math.isnan(gauc(labels, scores, users))
    assert strict_json.dumps(found["auc"]) == "null"


def test_of_nothing_nothing_is_measured() -> None:
    nothing = np.empty(0)
    found = all_metrics(nothing, nothing, nothing)
    assert {name for name, value in found.items() if math.isnan(value)} == NAMES


@given(rows)
def test_a_constant_is_no_better_than_the_mean_and_the_truth_is(table: list[tuple[int, int, int]]) -> None:
    labels, _, users = split(table)
    assume(len(set(labels.tolist())) == 2)
    mean = no_better_than_the_mean(all_metrics(labels, np.full(len(labels), labels.mean()), users))
    assert mean == "not better than always predicting the mean click rate (normalised entropy 1.0000, better is below 1)"
    assert no_better_than_the_mean(all_metrics(labels, np.where(labels > 0, 0.9, 0.1), users)) is None
    assert no_better_than_the_mean(all_metrics(labels, np.where(labels > 0, 0.1, 0.9), users)) is not None
    assert no_better_than_the_mean({"normalised_entropy": None}) is None  # one class, as JSON has it


@given(rows)
def test_gauc_ignores_a_shift_of_one_users_scores(table: list[tuple[int, int, int]]) -> None:
    labels, scores, users = split(table)
    assert gauc(labels, scores + users, users) == pytest.approx(gauc(labels, scores, users), abs=1e-12, nan_ok=True)


@given(rows)
def test_logloss_equals_sklearn(table: list[tuple[int, int, int]]) -> None:
    labels, scores, _ = split(table)
    assert logloss(labels, scores) == pytest.approx(log_loss(labels, scores, labels=[0, 1]), rel=1e-9)


def test_logloss_of_a_certain_mistake_is_finite() -> None:
    assert 20 < logloss(np.array([1, 0]), np.array([0.0, 1.0])) < 40
    assert logloss(np.array([1, 0]), np.array([1.0, 0.0])) == pytest.approx(0, abs=1e-9)


@given(rows)
def test_normalised_entropy_of_the_base_rate_is_one(table: list[tuple[int, int, int]]) -> None:
    labels, scores, _ = split(table)
    if len(set(labels.tolist())) == 1:
        assert math.isnan(normalised_entropy(labels, scores))
        return
    assert normalised_entropy(labels, np.full(len(labels), labels.mean())) == pytest.approx(1)
    # No other constant is better.
    assert normalised_entropy(labels, np.full(len(labels), float(scores[0]))) >= 1 - 1e-12
    assert normalised_entropy(labels, np.where(labels > 0, 0.9, 0.1)) < 1


@given(rows, st.integers(1, 30))
def test_a_constant_that_is_right_on_average_is_calibrated(table: list[tuple[int, int, int]], bins: int) -> None:
    """In whatever order the impressions come: equal predictions are not torn into bins of different labels."""
    labels, _, _ = split(table)
    constant = np.full(len(labels), labels.mean())
    assert calibration_error(np.sort(labels), constant, bins) == pytest.approx(0, abs=1e-12)
    assert calibration_error(labels, constant, bins) == pytest.approx(0, abs=1e-12)


@given(rows, st.integers(1, 30))
def test_calibration_error_equals_a_plain_loop_within_its_bounds(table: list[tuple[int, int, int]], bins: int) -> None:
    labels, scores, _ = split(table)
    groups: dict[int, list[int]] = {}
    for i, score in enumerate(scores):
        below, same = int((scores < score).sum()), int((scores == score).sum())
        groups.setdefault(int((below + same / 2) * bins / len(scores)), []).append(i)
    assert max(groups) < bins
    expected = sum(len(g) * abs(labels[g].mean() - scores[g].mean()) for g in groups.values()) / len(labels)
    assert calibration_error(labels, scores, bins) == pytest.approx(expected, abs=1e-12)
    assert abs(labels.mean() - scores.mean()) - 1e-12 <= expected <= 1


def test_calibration_error_finds_overconfidence() -> None:
    chance = np.random.default_rng(1)
    truth = chance.uniform(0.05, 0.95, 50_000)
    labels = (chance.random(50_000) < truth).astype(np.int8)
    assert calibration_error(labels, truth) < 0.01
    assert calibration_error(labels, np.where(truth > 0.5, 0.99, 0.01)) > 0.15


@given(rows, st.randoms())
def test_no_metric_depends_on_the_order_of_impressions(table: list[tuple[int, int, int]], chance: object) -> None:
    shuffled = list(table)
    chance.shuffle(shuffled)  # pyright: ignore[reportAttributeAccessIssue]
    one, other = all_metrics(*split(table)), all_metrics(*split(shuffled))
    assert one.keys() == other.keys() == {*NAMES, "impressions", "users", "users_two"}
    for name, value in one.items():
        assert other[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_gives_no_warning_and_no_wild_number(label: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = all_metrics(np.full(5, label, np.int8), np.linspace(0.1, 0.9, 5), np.arange(5) // 2)
    assert [name for name, value in found.items() if math.isnan(value)] == [
        "auc",
        "gauc",
        "uauc",
        "uauc_two",
        "normalised_entropy",
    ]
    assert (found["users"], found["users_two"]) == (0, 0)
    assert 0 < found["logloss"] < 3
