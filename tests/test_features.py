"""Signals of users and items against loops that are right by being obvious; no event's signals depend on a later one."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrsink.features.categories import categories
from ctrsink.features.histories import Histories
from ctrsink.features.neighbours import Neighbours
from ctrsink.features.numbers import CLIP, number, z_scores
from ctrsink.features.ragged import Ragged
from ctrsink.features.registry import SIGNALS, numbers_with

ITEMS = 6
NUMBERS = numbers_with(("fields", "neighbours"))


def table(chance: np.random.Generator) -> Neighbours:
    partners = [np.sort(chance.choice(ITEMS, chance.integers(0, ITEMS), replace=False)) for _ in range(ITEMS)]
    ragged = Ragged.of(partners)
    size = len(ragged.values)
    return Neighbours(
        ragged.offsets,
        ragged.values.astype(np.int32),
        chance.normal(size=size).astype(np.float32),
        chance.integers(2, 9, size).astype(np.int32),
        variance=0.7,
        shrink=3.0,
    )


@st.composite
def histories(draw: st.DrawFn) -> Histories:
    """Up to three users with up to nine events each; some outcomes and means are unknown, some events are of one request."""
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    count = sum(sizes)
    begins = (np.cumsum(sizes) - sizes).repeat(sizes)
    known = np.arange(count) - begins
    if draw(st.booleans()):
        known -= known % 2  # two events a request
    outcome = np.where(chance.random(count) < 0.2, np.nan, chance.integers(0, 6, count).astype(float))
    return Histories(
        begins=begins,
        known=known,
        timestamps=np.sort(chance.integers(0, 10**6, count)),
        outcome=outcome,
        labels=chance.integers(-1, 2, count).astype(np.int8),
        item_mean=np.where(chance.random(count) < 0.2, np.nan, chance.normal(3, 1, count)),
        item_count=chance.integers(0, 50, count).astype(float),
        items=chance.integers(-1, ITEMS, count),
        counted=(counted := chance.random(count) < 0.5),
        inside=counted | (chance.random(count) < 0.5),
        fields=Ragged.of([np.unique(chance.integers(0, 4, chance.integers(0, 3))) for _ in range(count)]),
        neighbours=table(chance),
        window=draw(st.sampled_from([1, 3, 200])),
    )


def similarity(t: Neighbours, i: int, j: int, own: float, both: bool) -> float:
    if i < 0 or j < 0:
        return 0.0
    for place in range(t.offsets[i], t.offsets[i + 1]):
        if t.partners[place] == j and (users := int(t.common[place]) - both) > 0:
            return (float(t.products[place]) - own) / (t.variance * (users + t.shrink))
    return 0.0


def plain(h: Histories) -> dict[str, list[float]]:
    """Every number of every event, event by event."""
    assert h.items is not None
    assert h.counted is not None
    assert h.inside is not None
    assert h.neighbours is not None
    has = [bool(np.isfinite(o) and np.isfinite(m)) for o, m in zip(h.outcome, h.item_mean, strict=True)]
    e = [float(o - m) if ok else 0.0 for o, m, ok in zip(h.outcome, h.item_mean, has, strict=True)]
    windows = [range(max(b, b + k - h.window), b + k) for b, k in zip(h.begins.tolist(), h.known.tolist(), strict=True)]

    def values(row: int) -> set[int]:
        assert h.fields is not None
        return set(h.fields.values[h.fields.offsets[row] : h.fields.offsets[row + 1]].tolist())

    def latest(window: range, count: int) -> list[int]:
        return list(window)[-count:]

    res = [sum(e[r] for r in w) / (sum(has[r] for r in w) + 5) for w in windows]
    d = [x - y if ok else 0.0 for x, y, ok in zip(e, res, has, strict=True)]
    meetings = [
        [r for r in range(len(d)) if h.begins[r] == h.begins[row] and h.items[r] == h.items[row] and h.counted[r]]
        if h.inside[row]
        else []
        for row in range(len(d))
    ]
    own = [sum(d[r] for r in rows) for rows in meetings]
    out: dict[str, list[float]] = {name: [] for name in NUMBERS}
    for row, window in enumerate(windows):
        out["deviation"].append(e[row] if has[row] else np.nan)
        out["item_mean"].append(h.item_mean[row])
        out["item_count"].append(np.log1p(h.item_count[row]))
        out["user_res"].append(res[row])
        out["user_count"].append(np.log1p(sum(has[r] for r in window)))
        for count, drawn in ((2, 1), (5, 2), (20, 4)):
            rows = latest(window, count)
            out[f"recent{count}"].append(sum(e[r] for r in rows) / (sum(has[r] for r in rows) + drawn))
        rows = latest(window, 10)
        seen = sum(h.labels[r] >= 0 for r in rows)
        out["recent_rate"].append((sum(h.labels[r] > 0 for r in rows) + 1) / (seen + 2))
        means = []
        for value in values(row):
            like = [r for r in window if value in values(r)]
            means.append(sum(d[r] for r in like) / (sum(has[r] for r in like) + 4))
        out["field_res"].append(float(np.mean(means)) if means else 0.0)
        out["expected"].append(h.item_mean[row] + res[row])
        out["user_std"].append(float(np.sqrt(sum(e[r] ** 2 for r in window) / (sum(has[r] for r in window) + 1))))
        above = below = liked = 0.0
        for r in window:
            both = bool(meetings[row] and meetings[r])
            s = similarity(h.neighbours, h.items[row], h.items[r], own[row] * own[r] if both else 0.0, both)
            above, below, liked = above + s * d[r], below + abs(s), liked + s * (h.labels[r] > 0)
        out["affinity"].append(above / (below + 0.3))
        out["affinity_rate"].append(liked / (below + 0.3))
        out["familiarity"].append(float(np.log1p(10 * below)))
    return out


@given(histories())
def test_every_number_is_what_a_loop_over_events_finds(h: Histories) -> None:
    expected = plain(h)
    assert set(expected) == set(NUMBERS)
    for name in NUMBERS:
        np.testing.assert_allclose(number(name, h), expected[name], atol=1e-5, err_msg=name)


@given(histories(), st.integers(0, 26))
def test_no_event_knows_itself_or_a_later_one(h: Histories, at: int) -> None:
    """Everything that becomes known at an event or later is changed: what targets are told before and there stays."""
    assert h.items is not None
    at %= len(h.begins)
    later = (h.begins == h.begins[at]) & (np.arange(len(h.begins)) - h.begins >= h.known[at])
    changed = dataclasses.replace(
        h,
        outcome=np.where(later, 9.0, h.outcome),
        labels=np.where(later, 1, h.labels).astype(np.int8),
        counted=h.counted & ~later,
    )
    before = dataclasses.replace(h, counted=h.counted & ~later)  # the event's own part is told by its outcome, and is not counted
    for name in NUMBERS:
        if "target" in SIGNALS[name].sides:
            rows = (~later & (h.begins == h.begins[at])) | (np.arange(len(h.begins)) == at)
            # Sums run over all users and values: what comes later may change the rounding, a millionth of what a float32 keeps.
            np.testing.assert_allclose(number(name, changed)[rows], number(name, before)[rows], atol=1e-13, err_msg=name)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e6])
def test_a_number_of_any_scale_is_told_and_one_that_is_always_the_same_is_not(scale: float) -> None:
    columns = {"log.x": np.array([1.0, 2.0, np.nan]) * scale, "log.same": np.full(3, 0.1)}
    h = Histories(*np.zeros((7, 3), np.int64), columns=columns)
    deviations = {"log.x": (1.5 * scale, 0.5 * scale), "log.same": (0.1 + 1e-17, 1e-17)}
    np.testing.assert_allclose(z_scores(("log.x", "log.same"), h, deviations), [[-1, 0], [1, 0], [0, 0]], rtol=1e-6)


@given(histories())
def test_z_scores_are_within_bounds_and_unknown_is_the_mean(h: Histories) -> None:
    z = z_scores(("item_mean", "deviation"), h, {"item_mean": (3.0, 0.01), "deviation": (0.0, 1.0)})
    assert z.dtype == np.float32
    assert np.abs(z).max() <= CLIP
    assert (z[~np.isfinite(h.item_mean), 0] == 0).all()


def test_a_signal_of_a_behaviour_is_not_told_of_targets() -> None:
    """A target's feedback, and how far it lies from the item's mean, is what is to be predicted."""
    assert [name for name, signal in SIGNALS.items() if signal.kind != "bucket" and signal.sides == ("behaviour",)] == [
        "feedback",
        "deviation",
    ]


@pytest.mark.parametrize(("moment", "offset", "hour", "weekday"), [(0, 0.0, 0, 3), (0, -1.0, 23, 2), (1764115200, 5.5, 5, 2)])
def test_hour_and_weekday(moment: int, offset: float, hour: int, weekday: int) -> None:
    """1970 began on a Thursday; 26 November 2025, 00:00 UTC was a Wednesday."""
    found = categories(("hour", "weekday"), np.array([moment]), np.zeros(1), offset)
    assert (int(found["hour"][0]), int(found["weekday"][0])) == (hour, weekday)
