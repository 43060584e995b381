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

from ctrsink.attention.kinds import FEEDBACK, PREFIX, SINK, TEXT
from ctrsink.config.data import PrepareSpec
from ctrsink.dataset.events import UserEvents
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.families.decoder.encode import encode
from ctrsink.families.facts import Wording
from ctrsink.features.buckets import signal_ids
from ctrsink.features.ragged import Ragged
from ctrsink.prepare.build import prepare
from ctrsink.sequences.collate import collate
from ctrsink.sequences.columns import Sequences
from ctrsink.sequences.windows import Cuts
from tests import builders
from tests.builders import FEEDBACKS, TEXTS, VECTORS, batch_of, events_of, layout_of, random_sequence, told_sequence
from tests.padded import named, padded

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
        "decoder",
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
    out["events"] = targets
    out["times"] = [int(chronology.timestamps[t]) for t in targets]
    pairs = [(a, e) for a in asked for e in behaviours] if layout.similarity else []
    out["similarity"] = [plain_similarity(*chronology.texts[[a, e]].tolist()) if e < a else 0.0 for a, e in pairs]
    return out


@given(cases())
def test_a_sequence_is_what_the_plain_builder_makes(case: tuple[UserEvents, np.ndarray, Layout, np.ndarray]) -> None:
    chronology, targets, layout, prefix = case
    sequences = told_sequence(chronology, targets, layout, prefix)
    built = named(sequences)
    expected = plain(chronology, targets.tolist(), layout, prefix.tolist())
    assert {name: column.tolist() for name, column in sequences.columns.items()} == expected
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
    built = named(told_sequence(chronology, targets, layout, prefix))
    for slot, target in enumerate(targets):
        later = np.arange(len(chronology.texts)) > target
        now = later | (np.arange(len(chronology.texts)) == target)
        changed = UserEvents(
            texts=np.where(later, (chronology.texts + 1) % 5, chronology.texts),
            feedbacks=np.where(now, (chronology.feedbacks + 1) % 3, chronology.feedbacks),
            timestamps=np.where(later, chronology.timestamps + 10**6, chronology.timestamps),
            labels=np.where(now & (chronology.labels >= 0), 1 - chronology.labels, chronology.labels).astype(np.int8),
        )
        other = named(told_sequence(changed, targets, layout, prefix))
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
    of_both = [Layout("decoder", examples, history, 1, signals, 10, **more) for examples in ("per_target", "per_user")]
    one, other = (named(told_sequence(chronology, np.array([target]), layout, np.array([90]))) for layout in of_both)
    assert vars(one).keys() == vars(other).keys()
    for name, column in vars(one).items():
        if name != "aligned":
            assert column.tolist() == getattr(other, name).tolist()
    assert one.aligned.tolist() == ((one.kinds == TEXT) & (one.event_ids == one.event_ids[-1])).tolist()
    assert other.aligned.tolist() == (other.kinds == TEXT).tolist()


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5), st.data())
def test_ragged_take_is_concatenation(rows: list[list[int]], data: st.DataObject) -> None:
    table = Ragged.of([np.array(r, np.int64) for r in rows])
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6)) if rows else []
    index = np.array(chosen, np.int64)
    assert table.lengths(index).tolist() == [len(rows[c]) for c in chosen]
    assert table.take(index).tolist() == [token for c in chosen for token in rows[c]]


@given(st.integers(0, 2**32), st.lists(st.integers(1, 9), min_size=1, max_size=4), layouts(), st.data())
def test_a_batch_holds_the_columns_of_its_sequences_one_behind_another(
    seed: int, events: list[int], layout: Layout, data: st.DataObject
) -> None:
    """In any order, some not at all and some twice; numbers of positions are counted from the start of the batch."""
    chance = np.random.default_rng(seed)
    built = [random_sequence(chance, layout, n) for n in events]
    rows = np.array(data.draw(st.lists(st.integers(0, len(events) - 1), min_size=1, max_size=5)))
    counted = np.array([data.draw(st.booleans()) for _ in rows])
    batch = collate(Sequences.joined(built), rows, 10 + rows, counted)
    sequences = [built[row] for row in rows]
    assert batch.axes.keys() == sequences[0].bounds.keys() >= {"positions", "sinks", "asked", "targets"}
    for name, axis in batch.axes.items():
        assert axis.lengths.tolist() == [s.bounds[name][-1] for s in sequences]
        assert axis.offsets.tolist() == [0, *axis.lengths.cumsum()]
    found = {name: column.numpy() for name, column in batch.inputs.items()}
    found |= {name: getattr(batch.targets, name).numpy() for name in ("labels", "events", "times")}
    assert found.keys() == sequences[0].columns.keys()
    assert sequences[0].points == dict.fromkeys(("sink_positions", "readout_positions", "asked_positions"), "positions")
    for name, column in found.items():
        starts = batch.axes["positions"].offsets.tolist()[:-1]
        shifts = starts if name in sequences[0].points else [0] * len(starts)
        expected = [s.columns[name] + shift for s, shift in zip(sequences, shifts, strict=True)]
        assert column.dtype == sequences[0].columns[name].dtype
        assert column.tolist() == np.concatenate(expected).tolist()
    per_row = [len(named(s).events) for s in sequences]
    assert batch.targets.users.tolist() == np.repeat(10 + rows, per_row).tolist()
    assert batch.targets.counted.tolist() == np.repeat(counted, per_row).tolist()
    assert batch.tokens == sum(len(named(s).input_ids) for s in sequences)
    assert batch.impressions == int(np.dot(per_row, counted))
    assert batch.costs == {name: sum(int(s.costs[name][0]) for s in sequences) for name in sequences[0].costs}


@given(st.integers(0, 2**32), st.lists(st.integers(1, 9), min_size=1, max_size=4), layouts())
def test_sequences_joined_are_those_of_the_parts(seed: int, events: list[int], layout: Layout) -> None:
    chance = np.random.default_rng(seed)
    built = [random_sequence(chance, layout, n) for n in events]
    joined = Sequences.joined(built)
    assert len(joined) == len(built)
    assert joined.lengths.tolist() == [len(named(s).input_ids) for s in built]
    for number, sequence in enumerate(built):
        one = joined[number]
        assert {name: column.tolist() for name, column in one.columns.items()} == {
            name: column.tolist() for name, column in sequence.columns.items()
        }
        assert {name: bounds.tolist() for name, bounds in one.bounds.items()} == {
            name: bounds.tolist() for name, bounds in sequence.bounds.items()
        }
        assert {name: cost.tolist() for name, cost in one.costs.items()} == {
            name: cost.tolist() for name, cost in sequence.costs.items()
        }


def test_a_batch_without_any_behaviour_keeps_one_sink_slot() -> None:
    """Every rank runs every module, whatever its batch holds."""
    chance = np.random.default_rng(0)
    batch = batch_of([random_sequence(chance, layout_of(), 1)])
    assert batch.inputs["signals"].shape == (0, 1)
    assert padded(batch).sink_valid.tolist() == [[False]]
    assert padded(batch).signals.shape == (1, 1, 1)
    without = batch_of([random_sequence(chance, layout_of(signals=()), 3)])
    assert without.inputs["sink_positions"].shape == (0,)
    assert without.inputs["signals"].shape == (0, 0)
    assert padded(without).sink_valid.tolist() == [[False]]


def test_a_row_that_only_fills_the_batch_has_no_impression() -> None:
    chance = np.random.default_rng(0)
    sequences = [random_sequence(chance, layout_of(), n) for n in (4, 6)]
    batch = batch_of(sequences, [0, 1], counted=[True, False])
    assert padded(batch).readout_valid.tolist() == [[True] * 3, [False] * 3]
    assert batch.impressions == 3


def test_a_batch_moves_whole() -> None:
    chance = np.random.default_rng(0)
    moved = batch_of([random_sequence(chance, layout_of(), 4)]).to("meta")
    tensors = [*vars(moved.targets).values(), *moved.inputs.values(), *(axis.offsets for axis in moved.axes.values())]
    assert {tensor.device for tensor in tensors} == {moved.device} == {torch.device("meta")}


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

    def sequence_of(targets: list[int], layout: Layout) -> Any:
        begin = shard.offsets[row]
        cuts = Cuts([shard], np.array([1]), np.array([begin]), Ragged.of([np.array(targets) + begin]))
        return named(encode(cuts, layout, Wording(dataset.feedbacks, dataset.prefix)))

    alone = Layout("decoder", "per_target", 4, 1, ("recency_rank", "time_gap"), 100)
    for target, history in ((1, 0), (4, 3), (5, 3), (8, 4)):
        sequence = sequence_of([target], alone)
        assert len(sequence.sink_positions) == history
        assert sequence.signals[:, 0].tolist() == list(range(history))[::-1]
        assert sequence.events.tolist() == [target]
    together = Layout("decoder", "per_user", 4, 3, ("previous_gap",), 100)
    with pytest.raises(InputError, match=r"use data\.examples per_request or per_target"):
        sequence_of([2, 3, 4], together)
    assert sequence_of([3, 4, 5], together).sink_positions.tolist() == sequence_of([3], together).sink_positions.tolist()
    assert sequence_of([9, 10, 11], together).events.tolist() == [9, 10, 11]
