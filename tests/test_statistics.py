"""How items were received before each event: equal to a plain count, however the log is cut, continued by what is appended."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrsink.dataset.arrow import to_parquet
from ctrsink.errors import InputError
from ctrsink.prepare.lookup import Lookup
from ctrsink.prepare.statistics import Received, Rule, latest, totals_as_counts

ITEMS = 4
IDS = pa.array([f"i{n}" for n in range(ITEMS)])
RULE = Rule(period_s=10, strength=2.0)


@st.composite
def logs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items, times and outcomes of up to 30 events; some have no outcome."""
    count = draw(st.integers(1, 30))
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    outcome = np.where(chance.random(count) < 0.2, np.nan, chance.normal(1, 3, count).astype(np.float32).astype(float))
    return chance.integers(0, ITEMS, count), chance.integers(-30, 60, count), outcome


def received(
    items: np.ndarray, times: np.ndarray, outcome: np.ndarray, cuts: list[int], before: pa.Table | None = None
) -> Received:
    bounds = [0, *sorted(cut % (len(items) + 1) for cut in cuts), len(items)]
    blocks = (RULE.count(IDS.take(pa.array(items[a:b])), times[a:b], outcome[a:b]) for a, b in itertools.pairwise(bounds))
    return Received.of(blocks, Lookup.of(IDS), before)


def plain(items: np.ndarray, times: np.ndarray, outcome: np.ndarray, item: int, time: int) -> tuple[float, int]:
    earlier = (times // RULE.period_s < time // RULE.period_s) & ~np.isnan(outcome)
    own = earlier & (items == item)
    if not earlier.any():
        return np.nan, 0
    return (outcome[own].sum() + RULE.strength * outcome[earlier].mean()) / (own.sum() + RULE.strength), int(own.sum())


@given(logs(), st.lists(st.integers(0, 30), max_size=4))
def test_an_event_knows_the_periods_before_its_own(log: tuple[np.ndarray, np.ndarray, np.ndarray], cuts: list[int]) -> None:
    items, times, outcome = log
    whole = received(items, times, outcome, cuts)
    assert whole.to_table() == received(items, times, outcome, []).to_table()
    mean, count = Received.from_table(whole.to_table()).before(RULE, items, times)
    expected = [plain(items, times, outcome, item, time) for item, time in zip(items, times, strict=True)]
    np.testing.assert_allclose(mean, [m for m, _ in expected], atol=1e-6)
    assert count.tolist() == [c for _, c in expected]


@given(logs(), st.integers(0, 29))
def test_a_later_event_changes_nothing(log: tuple[np.ndarray, np.ndarray, np.ndarray], at: int) -> None:
    items, times, outcome = log
    at %= len(items)
    changed = np.where(times >= times[at], 5.0, outcome)
    rows = times // RULE.period_s <= times[at] // RULE.period_s
    before, after = (received(items, times, values, []).before(RULE, items, times) for values in (outcome, changed))
    np.testing.assert_array_equal(before[0][rows], after[0][rows])
    np.testing.assert_array_equal(before[1][rows], after[1][rows])


@given(logs(), st.integers(-30, 60))
def test_what_is_appended_goes_on_from_the_totals(log: tuple[np.ndarray, np.ndarray, np.ndarray], cut: int) -> None:
    """Also where it begins within the last period of what was there."""
    items, times, outcome = log
    old, new = times < cut, times >= cut
    if not old.any() or not new.any():
        return
    first = received(items[old], times[old], outcome[old], [])
    table, last = first.totals(ITEMS)
    second = received(items[new], times[new], outcome[new], [], totals_as_counts(to_parquet(table), last))
    whole = received(items, times, outcome, [])
    of = RULE, items[new], times[new]
    for found, expected in zip(second.before(*of), whole.before(*of), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-9)
    assert second.totals(ITEMS)[0].equals(whole.totals(ITEMS)[0])
    known = ~np.isnan(outcome)
    mean, count, overall = latest(to_parquet(second.totals(ITEMS)[0]), RULE.strength)
    assert count.tolist() == np.bincount(items[known], minlength=ITEMS).tolist()
    if known.any():
        sums = np.bincount(items[known], outcome[known], ITEMS)
        np.testing.assert_allclose(overall, outcome[known].mean(), atol=1e-8)
        np.testing.assert_allclose(mean, (sums + RULE.strength * overall) / (count + RULE.strength), atol=1e-8)


def test_an_outcome_that_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(InputError, match="a feedback of 1e\\+30 is too large to be averaged: scale the column"):
        RULE.count(IDS[:1], np.zeros(1), np.array([1e30]))
