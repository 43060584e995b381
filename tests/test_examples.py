"""Sequences and batches against a slow builder that is right by being obvious."""

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ctrsink.config.data import PrepareSpec
from ctrsink.dataset.events import UserEvents
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.families.decoder.encode import build_sequence
from ctrsink.features.buckets import signal_ids
from ctrsink.features.ragged import Ragged
from ctrsink.prepare.build import prepare
from ctrsink.sequences.batch import FEEDBACK, PAD, PREFIX, SINK, TEXT
from ctrsink.sequences.collate import MULTIPLE, collate
from ctrsink.sequences.columns import Sequence
from tests import builders
from tests.builders import FEEDBACKS, TEXTS, VECTORS, events_of, layout_of, random_sequence, told_sequence

FREE: list[tuple[str, ...]] = [(), ("previous_gap",), ("feedback",), ("random", "hour", "previous_gap"), ("none",)]
BOUND: list[tuple[str, ...]] = [*FREE, ("recency_rank",), ("feedback", "time_gap", "recency_rank", "previous_gap")]
NUMBERS: list[tuple[str, ...]] = [(), ("deviation",), ("item_mean", "deviation")]
SIMILARITY: list[Literal["vectors"] | None] = [None, "vectors"]
prefixes = st.integers(0, 2).map(lambda n: np.array([90, 91][:n], np.int64))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    examples = draw(st.sampled_from(["per_target", "per_request", "per_user"]))
    per_user = examples == "per_user"
    layout = Layout(
        examples,
        draw(st.integers(0, 6)),
        draw(st.integers(1, 4)) if per_user else 1,
        draw(st.sampled_from(FREE if per_user else BOUND)),
        draw(st.sampled_from([2, 10, 100])),
        numbers=draw(st.sampled_from(NUMBERS)),
        target_signals=draw(st.sampled_from([(), ("weekday",), ("hour", "weekday")])),
        target_numbers=draw(st.sampled_from(NUMBERS)),
        base=draw(st.sampled_from([None, "log.rank"])),
        utc_offset_hours=draw(st.sampled_from([0.0, -3.5])),
    )
    if not layout.sinks:
        return layout
    text_history = draw(st.none() | st.integers(0, 6))
    return dataclasses.replace(
        layout,
        text_history=text_history,
        similarity=draw(st.sampled_from(SIMILARITY)),
        asked_history=draw(st.integers(0, 2 if text_history is None else text_history)) if per_user else 0,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[UserEvents, np.ndarray, Layout, np.ndarray]:
    """A chronology, the targets of one of its pieces or requests, a layout, a prefix."""
    chronology, layout = draw(builders.chronologies()), draw(layouts())
    if layout.examples == "per_request":
        return *draw(requests(chronology)), layout, draw(prefixes)
    impressions = int((chronology.labels >= 0).sum())
    first = draw(st.integers(0, -(-impressions // layout.targets) - 1)) * layout.targets
    targets = np.flatnonzero(chronology.labels >= 0)[first : first + layout.targets]
    return chronology, targets, layout, draw(prefixes)


@st.composite
def requests(draw: st.DrawFn, chronology: UserEvents) -> tuple[UserEvents, np.ndarray]:
    """The chronology with its events from some impression on shown at one moment, and up to four targets among them."""
    impressions = np.flatnonzero(chronology.labels >= 0)
    asked = int(draw(st.sampled_from(impressions.tolist())))
    later = np.arange(len(chronology.texts)) >= asked
    known = np.where(later, asked, np.arange(len(chronology.texts)))
    times = np.where(later, chronology.timestamps[asked], chronology.timestamps)
    chosen = draw(st.lists(st.sampled_from(impressions[impressions >= asked].tolist()), min_size=1, max_size=4, unique=True))
    return dataclasses.replace(chronology, known=known, timestamps=times), np.sort(chosen)


def row(table: Ragged, number: int) -> list[int]:
    return table.values[table.offsets[number] : table.offsets[number + 1]].tolist()


def clock(name: str, timestamp: int, layout: Layout) -> int:
    """The `hour` or `weekday` at a moment, from the calendar."""
    local = datetime.fromtimestamp(timestamp, UTC) + timedelta(hours=layout.utc_offset_hours)
    return {"hour": local.hour, "weekday": local.weekday()}[name]


def plain_similarity(one: int, other: int) -> float:
    """Of the items with these texts; where one is unknown it is 0 as well."""
    return sum(a * b for a, b in zip(VECTORS[one].tolist(), VECTORS[other].tolist(), strict=True))


def plain(chronology: UserEvents, targets: list[int], layout: Layout, prefix: list[int]) -> dict[str, list[Any]]:
    """The sequence, position by position."""
    names = ("input_ids", "kinds", "event_ids", "aligned", "candidate", "position_ids", "sink_positions")
    out: dict[str, list[Any]] = {name: [] for name in names}
    told, sinks = events_of(chronology, layout), bool(layout.signals or layout.numbers)
    ends: dict[int, int] = {}

    def put(ids: list[int], kind: int, event: int, aligned: bool = False, last: bool = False) -> None:
        for place, token in enumerate(ids):
            out["input_ids"].append(token)
            out["kinds"].append(kind)
            out["event_ids"].append(event)
            out["aligned"].append(aligned)
            out["candidate"].append(last)
            before = sum(not c for c in out["candidate"][:-1])
            out["position_ids"].append(before + place if last else before)

    put(prefix, PREFIX, 0)
    past = targets[0] if chronology.known is None else int(chronology.known[targets[0]])
    history = list(range(max(0, past - layout.history), past))
    bare = [] if layout.text_history is None else history[: max(0, len(history) - layout.text_history)]
    window = history + (list(range(past, targets[-1] + 1)) if layout.examples == "per_user" else targets)
    for number, event in enumerate(window, start=1):
        last = event == targets[-1] if layout.examples == "per_user" else event in targets
        if event not in bare:
            put(row(TEXTS, chronology.texts[event]), TEXT, number, last or layout.examples == "per_user", last)
            ends[event] = len(out["input_ids"]) - 1
        if not last:
            if event not in bare:
                put(row(FEEDBACKS, chronology.feedbacks[event]), FEEDBACK, number)
            if sinks:
                out["sink_positions"].append(len(out["input_ids"]))
                put([0], SINK, number)
    behaviours = [e for e in window if e not in targets or (layout.examples == "per_user" and e != targets[-1])] if sinks else []
    until = [*range(past), targets[0]] if layout.examples == "per_request" else range(targets[-1] + 1)

    def signal(name: str, event: int) -> int:
        if name in ("hour", "weekday"):
            return clock(name, int(chronology.timestamps[event]), layout)
        if name == "feedback":
            return int(chronology.feedbacks[event])
        return int(signal_ids((name,), chronology.timestamps[until], layout.buckets)[event, 0])

    assert told.numbers is not None
    assert told.target_numbers is not None
    out["signals"] = [[signal(name, e) for name in layout.signals] for e in behaviours]
    out["sink_numbers"] = [told.numbers[e].tolist() for e in behaviours]
    out["sink_times"] = [int(chronology.timestamps[e]) for e in behaviours]
    out["readout_positions"] = [ends[t] for t in targets]
    out["readout_numbers"] = [told.target_numbers[t].tolist() for t in targets]
    # A per_user event is a target and then a behaviour: all of them from the first target on, and as many before it as asked for.
    asked = window[max(0, len(history) - layout.asked_history) :] if layout.examples == "per_user" else targets
    out["asked_positions"] = [ends[e] for e in asked]
    out["asked_times"] = [int(chronology.timestamps[e]) for e in asked]
    out["asked_signals"] = [[signal(name, e) for name in layout.target_signals] for e in asked]
    out["asked_numbers"] = [told.target_numbers[e].tolist() for e in asked]
    out["base"] = [0.0 if told.base is None else float(told.base[t]) for t in targets]
    out["labels"] = [int(chronology.labels[t]) for t in targets]
    out["targets"] = targets
    pairs = [(a, e) for a in asked for e in behaviours] if layout.similarity else []
    out["similarity"] = [plain_similarity(*chronology.texts[[a, e]].tolist()) if e < a else 0.0 for a, e in pairs]
    return out


@given(cases())
def test_a_sequence_is_what_the_plain_builder_makes(case: tuple[UserEvents, np.ndarray, Layout, np.ndarray]) -> None:
    chronology, targets, layout, prefix = case
    built = told_sequence(chronology, targets, layout, prefix)
    expected = plain(chronology, targets.tolist(), layout, prefix.tolist())
    assert {f.name: getattr(built, f.name).tolist() for f in dataclasses.fields(Sequence)} == expected
    if not layout.sinks:
        assert not (built.kinds == SINK).any()
    assert (built.kinds[built.readout_positions] == TEXT).all()
    assert (built.labels >= 0).all()
    assert built.signals.shape == (len(built.sink_positions), len(layout.signals))
    assert built.sink_numbers.shape == (len(built.sink_positions), len(layout.numbers))
    assert built.readout_numbers.shape == (len(targets), len(layout.target_numbers))
    assert built.asked_signals.shape == (len(built.asked_positions), len(layout.target_signals))
    assert built.asked_numbers.shape == (len(built.asked_positions), len(layout.target_numbers))


@given(cases())
def test_nothing_the_target_may_not_know_lies_before_its_readout(
    case: tuple[UserEvents, np.ndarray, Layout, np.ndarray],
) -> None:
    """Everything that happened at a target or later is changed: its input up to the readout stays."""
    chronology, targets, layout, prefix = case
    assume(layout.examples != "per_request")  # whose targets come at one moment: the test of sharing below
    built = told_sequence(chronology, targets, layout, prefix)
    for slot, target in enumerate(targets):
        later = np.arange(len(chronology.texts)) > target
        now = later | (np.arange(len(chronology.texts)) == target)
        changed = UserEvents(
            texts=np.where(later, (chronology.texts + 1) % 5, chronology.texts),
            feedbacks=np.where(now, (chronology.feedbacks + 1) % 3, chronology.feedbacks),
            timestamps=np.where(later, chronology.timestamps + 10**6, chronology.timestamps),
            labels=np.where(now & (chronology.labels >= 0), 1 - chronology.labels, chronology.labels).astype(np.int8),
        )
        other = told_sequence(changed, targets, layout, prefix)
        end = int(built.readout_positions[slot])
        assert other.readout_positions[slot] == end
        for name in ("input_ids", "kinds", "event_ids", "aligned"):
            assert getattr(other, name)[: end + 1].tolist() == getattr(built, name)[: end + 1].tolist()
        known = int((built.sink_positions < end).sum())
        assert other.sink_positions[:known].tolist() == built.sink_positions[:known].tolist()
        for name in ("signals", "sink_numbers", "sink_times"):
            assert getattr(other, name)[:known].tolist() == getattr(built, name)[:known].tolist()
        asked = int((built.asked_positions <= end).sum())
        assert built.asked_positions[asked - 1] == end
        for name in ("asked_positions", "asked_times", "asked_signals", "asked_numbers"):
            assert getattr(other, name)[:asked].tolist() == getattr(built, name)[:asked].tolist()
        assert other.readout_numbers[: slot + 1].tolist() == built.readout_numbers[: slot + 1].tolist()
        if layout.similarity:
            size = len(built.asked_positions), len(built.sink_positions)
            found, expected = (s.similarity.reshape(size)[:asked] for s in (other, built))
            assert found.tolist() == expected.tolist()
            assert not found[:, known:].any()


@given(builders.chronologies(), st.integers(0, 6), st.sampled_from(FREE), st.data())
def test_per_user_with_one_target_is_per_target_but_for_aligned(
    chronology: UserEvents, history: int, signals: tuple[str, ...], data: st.DataObject
) -> None:
    target = data.draw(st.sampled_from(np.flatnonzero(chronology.labels >= 0).tolist()))
    more: dict[str, Any] = {"numbers": ("deviation",), "text_history": data.draw(st.none() | st.integers(0, 6))}
    one, other = (
        told_sequence(chronology, np.array([target]), Layout(e, history, 1, signals, 10, **more), np.array([90]))
        for e in ("per_target", "per_user")
    )
    for field in dataclasses.fields(Sequence):
        if field.name != "aligned":
            assert getattr(one, field.name).tolist() == getattr(other, field.name).tolist()
    assert one.aligned.tolist() == ((one.kinds == TEXT) & (one.event_ids == one.event_ids[-1])).tolist()
    assert other.aligned.tolist() == (other.kinds == TEXT).tolist()


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5), st.data())
def test_ragged_take_is_concatenation(rows: list[list[int]], data: st.DataObject) -> None:
    table = Ragged.of([np.array(r, np.int64) for r in rows])
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6)) if rows else []
    index = np.array(chosen, np.int64)
    assert table.lengths(index).tolist() == [len(rows[c]) for c in chosen]
    assert table.take(index).tolist() == [token for c in chosen for token in rows[c]]


@given(st.integers(0, 2**32), st.lists(st.integers(1, 9), min_size=1, max_size=4), layouts())
def test_a_batch_holds_its_sequences_and_padding_only(seed: int, events: list[int], layout: Layout) -> None:
    chance = np.random.default_rng(seed)
    sequences = [random_sequence(chance, layout, n) for n in events]
    batch = collate(sequences, [10 + i for i in range(len(events))])
    length = batch.input_ids.shape[1]
    assert length % MULTIPLE == 0
    assert (batch.kinds[:, -1] == PAD).all()
    assert batch.tokens == sum(len(s.input_ids) for s in sequences)
    assert batch.impressions == sum(len(s.targets) for s in sequences)
    assert batch.similarity.shape[2] in (0, batch.sink_valid.shape[1])
    for i, s in enumerate(sequences):
        n, k, t, m = len(s.input_ids), len(s.sink_positions), len(s.targets), len(s.asked_positions)
        for name in ("input_ids", "kinds", "event_ids", "aligned", "candidate", "position_ids"):
            assert getattr(batch, name)[i, :n].tolist() == getattr(s, name).tolist()
            assert not getattr(batch, name)[i, n:].any()
        for count, owner, names in (
            (k, "sink", ("signals", "sink_numbers", "sink_times")),
            (t, "readout", ("readout_numbers", "labels")),
            (m, "asked", ("asked_times", "asked_signals", "asked_numbers")),
        ):
            valid, positions = getattr(batch, f"{owner}_valid")[i], getattr(batch, f"{owner}_positions")[i]
            assert valid.tolist() == [True] * count + [False] * (len(valid) - count)
            assert positions[:count].tolist() == getattr(s, f"{owner}_positions").tolist()
            assert (positions[count:] == length - 1).all()
            for name in names:
                assert getattr(batch, name)[i, :count].tolist() == getattr(s, name).tolist()
                assert not getattr(batch, name)[i, count:].any()
        assert batch.targets[i, :t].tolist() == [[10 + i, e] for e in s.targets]
        assert (batch.targets[i, t:] == -1).all()
        assert batch.similarity[i, :m, :k].flatten().tolist() == s.similarity.tolist()
        assert not batch.similarity[i, m:].any()
        assert not batch.similarity[i, :, k:].any()


def test_a_batch_without_any_behaviour_keeps_one_sink_slot() -> None:
    """Every rank runs every module, whatever its batch holds."""
    chance = np.random.default_rng(0)
    batch = collate([random_sequence(chance, layout_of(), 1)], [0])
    assert batch.sink_valid.tolist() == [[False]]
    assert batch.signals.shape == (1, 1, 1)
    without = collate([random_sequence(chance, layout_of(signals=()), 3)], [0])
    assert without.sink_positions.shape == (1, 0)


def test_a_row_that_only_fills_the_batch_has_no_impression() -> None:
    chance = np.random.default_rng(0)
    sequences = [random_sequence(chance, layout_of(), n) for n in (4, 6)]
    batch = collate(sequences, [0, 1], counted=[True, False])
    assert batch.readout_valid.tolist() == batch.asked_valid.tolist() == [[True] * 3, [False] * 3]


def test_a_batch_moves_whole() -> None:
    chance = np.random.default_rng(0)
    moved = collate([random_sequence(chance, layout_of(), 4)], [0]).to("meta")
    assert {getattr(moved, f.name).device for f in dataclasses.fields(moved)} == {torch.device("meta")}


def test_impressions_of_one_request_share_a_history_and_do_not_see_each_other(tmp_path: Path) -> None:
    """Two users' events with requests: a target knows what was known when its request was made."""
    log = "user,item,timestamp,click,page\n" + "".join(
        f"{user},i{n % 3},{100 * n + user},{(n + user) % 2},{page}\n"
        for user in (1, 2)
        for n, page in enumerate(["a", "a", "", "b", "b", "b", "", "c", "c", "d", "e", "f"])
    )
    (tmp_path / "events.csv").write_text(log)
    tree = {
        "source": {
            "kind": "table",
            "path": str(tmp_path / "events.csv"),
            "columns": {"feedback": "click", "label": "click", "request": "page"},
        },
        "text": {"item": "{item}"},
        "tokenizer": {"train_vocabulary": 300},
    }
    prepare(PrepareSpec.model_validate(tree), str(tmp_path / "data"))
    dataset = Dataset(str(tmp_path / "data"))
    shard, row = dataset.locate(0)
    chronology = shard.chronology(row)
    assert chronology.known is not None
    assert chronology.known.tolist() == [0, 0, 2, 3, 3, 3, 6, 7, 7, 9, 10, 11]
    alone = Layout("per_target", 4, 1, ("recency_rank", "time_gap"), 100)
    tokens = (shard.tokens, dataset.feedbacks, dataset.prefix)
    for target, history in ((1, 0), (4, 3), (5, 3), (8, 4)):
        sequence = build_sequence(chronology, np.array([target]), alone, *tokens)
        assert len(sequence.sink_positions) == history
        assert sequence.signals[:, 0].tolist() == list(range(history))[::-1]
        assert sequence.targets.tolist() == [target]
    together = Layout("per_user", 4, 3, ("previous_gap",), 100)
    with pytest.raises(InputError, match=r"use data\.examples per_request or per_target"):
        build_sequence(chronology, np.array([2, 3, 4]), together, *tokens)
    assert build_sequence(chronology, np.array([3, 4, 5]), together, *tokens).sink_positions.tolist() == (
        build_sequence(chronology, np.array([3]), together, *tokens).sink_positions.tolist()
    )
    assert build_sequence(chronology, np.array([9, 10, 11]), together, *tokens).targets.tolist() == [9, 10, 11]
