"""What a sink tells of its behaviour: buckets against slow, plain definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrsink.features.buckets import log_bucket, signal_ids

CENTURY = int(100 * 365.25 * 86400)
ALL: tuple[str, ...] = ("recency_rank", "time_gap", "previous_gap", "random", "none")

times = st.lists(st.integers(0, 2 * 10**9), min_size=1, max_size=12).map(lambda t: np.sort(np.array(t, np.int64)))
buckets = st.integers(2, 200)


@given(st.lists(st.integers(-100, 2 * CENTURY), min_size=1, max_size=20), buckets)
def test_log_bucket_is_monotone_and_leaves_zero_free(seconds: list[int], count: int) -> None:
    found = log_bucket(np.sort(np.array(seconds)), count)
    assert found.dtype == np.int64
    assert found.min() >= 1
    assert found.max() <= count - 1
    assert (np.diff(found) >= 0).all()


@given(buckets)
def test_log_bucket_uses_its_whole_range(count: int) -> None:
    assert log_bucket(np.array([0, CENTURY, 10 * CENTURY]), count).tolist() == [1, count - 1, count - 1]


def test_log_bucket_tells_seconds_hours_days_and_years_apart() -> None:
    spans = np.array([1, 60, 3600, 86400, 7 * 86400, 365 * 86400, 3650 * 86400])
    assert len(set(log_bucket(spans, 100).tolist())) == len(spans)


@given(times, buckets)
def test_gaps_and_ranks_equal_a_plain_loop(stamps: np.ndarray, count: int) -> None:
    found = signal_ids(("recency_rank", "time_gap", "previous_gap"), stamps, count)
    assert found.shape == (len(stamps), 3)
    target = stamps[-1]
    for i in range(len(stamps) - 1):
        between = sum(1 for j in range(len(stamps)) if i < j < len(stamps) - 1)
        scale = (count - 1) / math.log1p(CENTURY)
        gap = 1 + min(count - 2, math.floor(scale * math.log1p(target - stamps[i])))
        before = 1 + min(count - 2, math.floor(scale * math.log1p(stamps[i] - stamps[i - 1]))) if i else 0
        assert found[i, 0] == min(between, count - 1)
        # Two libraries' logarithms may differ in the last digit, at a bucket's edge.
        assert abs(found[i, 1] - gap) <= 1
        assert abs(found[i, 2] - before) <= 1
        assert found[i, 2] == 0 or i


@given(times, buckets, st.sampled_from(ALL))
def test_every_signal_stays_in_its_table(stamps: np.ndarray, count: int, signal: str) -> None:
    found = signal_ids((signal,), stamps, count)
    assert found.dtype == np.int64
    assert found.shape == (len(stamps), 1)
    assert found.min() >= 0
    assert found.max() < count


@given(times, buckets, st.integers(0, 11))
def test_signals_that_do_not_depend_on_the_target_stay_when_events_follow(stamps: np.ndarray, count: int, cut: int) -> None:
    """A per_user sequence computes them once for many targets; a score computes them from a shorter chronology."""
    free: tuple[str, ...] = ("previous_gap", "random", "none")
    head = stamps[: 1 + cut % len(stamps)]
    assert signal_ids(free, head, count).tolist() == signal_ids(free, stamps, count)[: len(head)].tolist()


def test_random_belongs_to_the_event_and_spreads_over_the_buckets() -> None:
    stamps = np.arange(1_000_000_000, 1_000_020_000, 10)
    found = signal_ids(("random",), stamps, 20)[:, 0]
    assert found[1500:].tolist() == signal_ids(("random",), stamps[1500:], 20)[:, 0].tolist()
    shares = np.bincount(found, minlength=20) / len(found)
    assert shares.min() > 0.03
    assert shares.max() < 0.07


@pytest.mark.parametrize("signals", [("none", "recency_rank"), ("recency_rank", "none")])
def test_columns_keep_the_order_of_the_names(signals: tuple[str, ...]) -> None:
    found = signal_ids(signals, np.array([5, 6, 7, 8]), 9)
    assert found[:, signals.index("none")].tolist() == [0, 0, 0, 0]
    assert found[:, signals.index("recency_rank")].tolist() == [2, 1, 0, 0]
