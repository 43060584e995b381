"""Similarity buckets and retrieval against plain loops, alone and in the sequences that are built of them."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrsink.config import parse_run
from ctrsink.dataset.events import Events, UserEvents
from ctrsink.dataset.layout import Layout
from ctrsink.errors import InputError
from ctrsink.families.decoder.encode import encode
from ctrsink.families.facts import Wording
from ctrsink.features.buckets import signal_ids
from ctrsink.features.histories import Histories
from ctrsink.features.ragged import Ragged
from ctrsink.features.similarity import cosines, most_similar, similarity_bucket
from ctrsink.sequences.windows import Cuts, windows_of
from tests.builders import FEEDBACKS, TEXTS, chronologies, events_of
from tests.padded import named
from tests.serving_fixtures import LLAMA
from tests.test_neighbours import build, dense, log

# Quarters: their products are exact in any order of summation. Some rows are zero: unknown.
quarters = st.lists(st.integers(-2, 2), min_size=4, max_size=4)
ITEMS = len(TEXTS.offsets) - 1


def tables(rows: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(quarters, min_size=rows, max_size=rows).map(lambda found: np.array(found, np.float16).reshape(rows, 4) / 4)


def plain_cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) if any(a) and any(b) else math.nan


def plain_bucket(cosine: float, buckets: int) -> int:
    return 0 if math.isnan(cosine) else 1 + min(buckets - 2, math.floor((cosine + 1) / 2 * (buckets - 1)))


def plain_choice(cosine: list[float], count: int) -> list[int]:
    """Numbers of the most similar, ascending; the later first where they are alike, the unknown last."""
    ranked = sorted(range(len(cosine)), key=lambda i: (-2 if math.isnan(cosine[i]) else cosine[i], i), reverse=True)
    return sorted(ranked[:count])


@given(tables(6), st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=7), min_size=1, max_size=5), st.integers(1, 6))
def test_cosines_and_choices_of_many_chronologies_equal_a_plain_loop(
    vectors: np.ndarray, histories: list[list[int]], count: int
) -> None:
    """The last of each list is its target."""
    lengths = np.array([len(history) for history in histories])
    targets = np.array([history[-1] for history in histories]).repeat(lengths)
    found = cosines(vectors, np.concatenate(histories), targets)
    table = vectors.tolist()
    expected = [[plain_cosine(table[i], table[history[-1]]) for i in history] for history in histories]
    np.testing.assert_array_equal(found, np.concatenate(expected).astype(np.float32))
    kept = np.split(most_similar(found, lengths, count), lengths.cumsum()[:-1])
    for which, cosine in zip(kept, expected, strict=True):
        assert np.flatnonzero(which).tolist() == [*plain_choice(cosine[:-1], count), len(cosine) - 1]


@given(st.lists(st.floats(-1, 1, width=32) | st.just(math.nan), min_size=1), st.integers(2, 200))
def test_buckets_are_linear_and_leave_zero_to_the_unknown(cosine: list[float], buckets: int) -> None:
    found = similarity_bucket(np.array(cosine, np.float32), buckets)
    assert found.tolist() == [plain_bucket(value, buckets) for value in cosine]
    assert similarity_bucket(np.array([-1, 1], np.float32), buckets).tolist() == [1, buckets - 1]


@st.composite
def cases(draw: st.DrawFn) -> tuple[UserEvents, int, Layout, np.ndarray]:
    chronology = draw(chronologies())
    target = draw(st.sampled_from(np.flatnonzero(chronology.labels >= 0).tolist()))
    signals: tuple[str, ...] = draw(st.sampled_from([(), ("similarity",), ("previous_gap", "similarity", "recency_rank")]))
    history = draw(st.integers(1, 6))
    layout = Layout(
        "decoder",
        "per_target",
        history,
        1,
        signals,
        draw(st.sampled_from([2, 10])),
        retrieve=draw(st.none() | st.integers(1, history)),
        text_history=draw(st.none() | st.integers(0, history)) if signals else None,
    )
    return chronology, target, layout, draw(tables(ITEMS))


def built(chronology: UserEvents, target: int, layout: Layout, vectors: np.ndarray | None) -> SimpleNamespace:
    """The columns of the sequence of one target, of items with these vectors."""
    events = dataclasses.replace(events_of(chronology, layout), vectors=vectors)
    cuts = Cuts([events], np.array([1]), np.array([0]), Ragged.of([np.array([target])]))
    return named(encode(cuts, layout, Wording(FEEDBACKS, np.array([90]))))


@given(cases())
def test_a_sequence_holds_what_was_retrieved_with_the_signals_it_has_in_the_whole_history(
    case: tuple[UserEvents, int, Layout, np.ndarray],
) -> None:
    chronology, target, layout, vectors = case
    found = built(chronology, target, layout, vectors)
    table = vectors.tolist()
    window = list(range(max(0, target - layout.history), target))
    cosine = [plain_cosine(table[chronology.texts[i]], table[chronology.texts[target]]) for i in window]
    chosen = plain_choice(cosine, len(window) if layout.retrieve is None else layout.retrieve)
    # A chronology of just those events, without retrieval, reads the same; its signals would not be.
    rows = np.array([*(window[i] for i in chosen), target])
    columns = (getattr(chronology, name)[rows] for name in ("texts", "feedbacks", "timestamps", "labels"))
    plain = dataclasses.replace(layout, retrieve=None, signals=("none",) if layout.signals else ())
    expected = built(UserEvents(*columns), len(rows) - 1, plain, None)
    for name in ("input_ids", "kinds", "event_ids", "aligned", "sink_positions", "readout_positions", "labels"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()
    assert found.events.tolist() == [target]
    others: tuple[str, ...] = tuple(signal for signal in layout.signals if signal != "similarity")
    for column, signal in enumerate(layout.signals):
        if signal == "similarity":
            wanted = [plain_bucket(cosine[i], layout.buckets) for i in chosen]
        else:
            known = signal_ids(others, chronology.timestamps[: target + 1], layout.buckets)[:, others.index(signal)]
            wanted = known[[window[i] for i in chosen]].tolist()
        assert found.signals[:, column].tolist() == wanted


MANY, USERS, LENGTH = 8, 6, 24  # items, users, events of each


def opinions(seed: int) -> Histories:
    """Users who meet items again; their answers are numbers that no two sums of are alike."""
    chance = np.random.default_rng(seed)
    return log(chance, USERS, MANY, LENGTH, chance.normal(size=USERS * LENGTH))


def with_table(h: Histories, folder: Path) -> Histories:
    """The same, with the neighbours that are made of these events."""
    return dataclasses.replace(h, neighbours=build(folder, [h], MANY, MANY))


def by_neighbours(h: Histories, targets: np.ndarray, retrieve: int = 2, history: int = 8) -> list[list[int]]:
    """Rows of the behaviours that are retrieved for each of some targets."""
    assert h.items is not None
    events = Events(h.items, h.items, h.timestamps, h.labels, h.known, TEXTS, histories=h)
    cuts = Cuts([events], np.array([len(targets)]), h.begins[targets], Ragged.of([np.array([row]) for row in targets]))
    layout = Layout("decoder", "per_target", history, 1, retrieve=retrieve, retrieve_by="neighbours")
    found = windows_of(cuts, layout).behaviour_rows()
    return [rows.tolist() for rows in np.split(found.values, found.offsets[1:-1])]


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_retrieve_what_others_thought_alike_of(tmp_path: Path, seed: int) -> None:
    """Against sums over all pairs of items, less what the user put into them; a meeting with the item itself comes first."""
    h = with_table(opinions(seed), tmp_path)
    assert h.items is not None
    sums, common, variance = dense([h], MANY)
    items, (own, has) = h.items, h.own

    def similarity(asked: int, seen: int) -> float:
        i, j = items[[asked, seen]].tolist()
        both = bool(has[asked] and has[seen])
        if i == j or common[i, j] < 2:
            return math.inf if i == j else 0.0
        return (sums[i, j] - both * own[asked] * own[seen]) / (variance * (common[i, j] - both + 20))

    found = by_neighbours(h, np.arange(USERS * LENGTH))
    latest = 0
    for target, rows in enumerate(found):
        window = list(range(max(int(h.begins[target]), target - 8), target))
        assert rows == [window[i] for i in plain_choice([similarity(target, row) for row in window], 2)]
        latest += rows == window[-2:]
    assert latest < len(found) / 2


def test_what_neighbours_retrieve_does_not_depend_on_what_comes_later(tmp_path: Path) -> None:
    """Nor on the answer to the target, though the table is made of all that the user did in its range."""
    chance, h = np.random.default_rng(7), with_table(opinions(7), tmp_path)
    assert h.inside is not None
    rows = np.arange(USERS * LENGTH)
    nobody = np.zeros(len(rows), np.bool_)
    naive_differs = 0
    for target in rows:
        later = ((h.begins == h.begins[target]) | ~h.inside) & (h.timestamps > h.timestamps[target])
        now = later | (rows == target)
        changed = dataclasses.replace(
            h,
            items=np.where(later, chance.integers(0, MANY, len(rows)), h.items),
            outcome=np.where(now, chance.normal(size=len(rows)), h.outcome),
            labels=np.where(now, 1 - h.labels, h.labels),
            timestamps=np.where(later, h.timestamps + 10**6, h.timestamps),
        )
        changed = with_table(changed, tmp_path / str(target))
        one, other = (by_neighbours(of, rows[[target]]) for of in (h, changed))
        assert one == other
        # With the user's own part left in the table it would.
        one, other = (by_neighbours(dataclasses.replace(of, counted=nobody), rows[[target]]) for of in (h, changed))
        naive_differs += one != other
    assert naive_differs > USERS


@pytest.mark.parametrize(
    ("data", "signals", "message"),
    [
        ({"examples": "per_user"}, ["similarity"], "model.sinks.signals: similarity depends on the target"),
        ({"examples": "per_user", "retrieve": 3}, ["none"], "data: retrieve chooses behaviours for one target"),
        ({"history": 4, "retrieve": 5}, ["none"], "data: retrieve 5 is more than history 4"),
        ({"retrieve": 0}, ["none"], "data.retrieve"),
        (
            {"retrieve_by": "neighbours"},
            ["none"],
            "data: retrieve_by neighbours says how behaviours are retrieved, but retrieve is",
        ),
    ],
)
def test_what_has_no_single_target_or_nothing_to_choose_from_is_refused(
    data: dict[str, Any], signals: list[str], message: str
) -> None:
    tree = {
        "run_dir": "run",
        "data": {"uri": "data", **data},
        "model": {"backbone": {"config": LLAMA}, "sinks": {"signals": signals}},
        "stages": [{"name": "only", "trainable": ["sink"], "lr": {"sink": 0.1}, "steps": 1}],
    }
    with pytest.raises(InputError) as refused:
        parse_run(tree, "test")
    assert message in str(refused.value)
