"""A request is told what the evaluator was told: it scores as it was evaluated, and says what it must."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ctrsink.config.data import EncoderSpec, FieldSpec, NeighboursSpec, StatisticsSpec
from ctrsink.dataset.reader import Dataset
from ctrsink.dataset.signal_tables import signal_columns
from ctrsink.errors import InputError
from ctrsink.export.package import export_run
from ctrsink.prepare.build import append, prepare
from ctrsink.serve import Scorer, request_of
from ctrsink.serve.knowledge import Knowledge
from ctrsink.serve.requests import parse_request
from ctrsink.serve.told import histories_of
from tests.data_fixtures import make_events, prepare_spec
from tests.encoder_fixtures import write_encoder
from tests.serving_fixtures import Prepared, run_spec, write_run
from tests.told_fixtures import COLUMNS, evaluated, sourced, spec_of, told_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A log of users who meet items again, with a field of several values and a table of neighbours."""
    return told_data(tmp_path_factory.mktemp("told"), requests=False)


@pytest.fixture(scope="module")
def asked_together(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The same, whose requests hold several events."""
    return told_data(tmp_path_factory.mktemp("together"), requests=True)


@pytest.mark.parametrize(
    ("examples", "sequences"),
    [
        ("per_target", {}),
        ("per_target", {"text_history": 1}),
        ("per_target", {"history": 9, "retrieve": 2, "retrieve_by": "neighbours"}),
        ("per_request", {"targets": 3, "text_history": 0}),
        ("per_user", {"targets": 3, "history": 2}),
        ("per_user", {"targets": 3, "history": 2, "text_history": 0}),
    ],
    ids=str,
)
def test_a_request_scores_as_it_was_evaluated_with_all_signals(
    data: Prepared, tmp_path: Path, examples: str, sequences: dict[str, Any]
) -> None:
    spec = spec_of(data, str(tmp_path / "run"), examples, **sequences)
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    scorer, dataset = Scorer.load(str(tmp_path / "out")), Dataset(data.uri)
    compared = 0
    for split in ("valid", "test"):
        expected = evaluated(spec.run_dir, split)
        for number, (user, event) in enumerate(zip(expected.users.tolist(), expected.events.tolist(), strict=True)):
            if examples == "per_user":
                # The last target of a whole piece of three sees what a request shows: two behaviours, then two that were targets.
                place = number - int(np.flatnonzero(expected.users == user)[0])
                if place % 3 != 2 or event < 4:
                    continue
            request = json.loads(json.dumps(request_of(dataset, user, event)))
            assert scorer.score(request)[0] == pytest.approx(expected.probabilities[number], abs=1e-5)
            compared += 1
    assert compared >= 4


def test_neighbours_retrieve_for_a_request_as_they_did_in_evaluation(data: Prepared, tmp_path: Path) -> None:
    """Of a model that needs them for nothing else; candidates do not share a history."""
    spec = run_spec(data, str(tmp_path / "run"), history=9, retrieve=2, retrieve_by="neighbours")
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    assert "the 2 most similar to the target by what users thought of both" in (tmp_path / "out" / "README.md").read_text()
    scorer, dataset = Scorer.load(str(tmp_path / "out")), Dataset(data.uri)
    many = scorer.score(request_of(dataset, 1, 9, [0, 1, 2, 3]))
    alone = [scorer.score(request_of(dataset, 1, 9, [item]))[0] for item in range(4)]
    np.testing.assert_allclose(many, alone, atol=1e-5)


@pytest.mark.parametrize("examples", ["per_target", "per_request"])
def test_behaviours_of_one_request_did_not_know_one_another(asked_together: Prepared, tmp_path: Path, examples: str) -> None:
    """Nor do they when they are the history of a request to score."""
    spec = spec_of(asked_together, str(tmp_path / "run"), examples)
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    scorer, dataset = Scorer.load(str(tmp_path / "out")), Dataset(asked_together.uri)
    expected = evaluated(spec.run_dir, "test")
    for number, (user, event) in enumerate(zip(expected.users.tolist(), expected.events.tolist(), strict=True)):
        request = json.loads(json.dumps(request_of(dataset, user, event)))
        assert scorer.score(request)[0] == pytest.approx(expected.probabilities[number], abs=1e-5)
    apart = request_of(dataset, int(expected.users[-1]), int(expected.events[-1]))
    for behaviour in apart["history"]:
        behaviour["request"] = None
    assert scorer.score(apart)[0] != pytest.approx(expected.probabilities[-1], abs=1e-5)


def test_candidates_have_what_was_logged_with_them_in_that_request_and_nothing_of_another(asked_together: Prepared) -> None:
    dataset, known, alone = Dataset(asked_together.uri), 0, 0
    for user in range(len(dataset.index["shard"])):
        shard, row = dataset.locate(user)
        own = slice(int(shard.offsets[row]), int(shard.offsets[row + 1]))
        events = dataset.tables(int(dataset.index["shard"][user]), COLUMNS)[0]
        ranks = events["log.rank"][row].as_py()
        for event in range(own.stop - own.start):
            together = shard.known[own] == shard.known[own][event]
            items = list(dict.fromkeys(shard.items[own].tolist()))
            for item, candidate in zip(items, request_of(dataset, user, event, items)["candidates"], strict=True):
                met = [ranks[at] for at in np.flatnonzero((shard.items[own] == item) & together)]
                assert candidate["log.rank"] in (met or [None])
                known, alone = known + (candidate["log.rank"] is not None), alone + (not met)
    assert min(known, alone) > 20


@pytest.mark.parametrize("by_text", [False, True])
def test_a_model_of_data_that_were_appended_to_scores_new_items(data: Prepared, tmp_path: Path, by_text: bool) -> None:
    """The table of neighbours is older than they are. Asked to, what is like them follows from their texts."""
    rows = sorted(make_events(9, 12), key=lambda event: event[3])
    early, late = tmp_path / "early", tmp_path / "late"
    spec = data.spec.model_copy(update={"past_events": 10})
    if by_text:
        encoder = EncoderSpec(path=str(write_encoder(tmp_path / "encoder")), max_tokens=64)
        neighbours = NeighboursSpec(partners=3, shrink=2.0, by_text=True)
        spec = spec.model_copy(update={"encoder": encoder, "neighbours": neighbours})
    known = {event[1] for event in rows[:84]} - {7}
    first = [event for event in rows[:84] if event[1] in known]
    source = sourced(early, first)
    lines = Path(str(source.items)).read_text().splitlines(keepends=True)
    Path(str(source.items)).write_text("".join(line for line in lines if not line.startswith("i7,")))
    uri = str(early / "data")
    prepare(spec.model_copy(update={"source": source}), uri)
    manifest = append(spec.model_copy(update={"source": sourced(late, rows[84:])}), uri)
    appended = Prepared(uri, spec)
    run = spec_of(appended, str(tmp_path / "run"), "per_target")
    write_run(run)
    export_run(run.run_dir, str(tmp_path / "out"))
    scorer, dataset = Scorer.load(str(tmp_path / "out")), Dataset(uri)
    assert scorer.knowledge is not None
    assert len(scorer.knowledge.ids) == manifest.item_count
    expected = evaluated(run.run_dir, "test")
    for number, (user, event) in enumerate(zip(expected.users.tolist(), expected.events.tolist(), strict=True)):
        assert scorer.score(request_of(dataset, user, event))[0] == pytest.approx(expected.probabilities[number], abs=1e-5)
    every = pa.concat_tables(signal_columns(dataset).values())
    new = every.filter(pc.field("item") == scorer.knowledge.rows(["i7"])[0])
    assert new.num_rows
    assert (np.abs(new.column("familiarity").to_numpy()).max() > 0) == by_text


def test_the_card_says_what_a_request_must_say(data: Prepared, tmp_path: Path) -> None:
    spec = spec_of(data, str(tmp_path / "run"), "per_target")
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "its `id`, and its `genres`, `year`; an id" in card
    assert "`item_mean`, `item_count`, `mean.item.genres`, `count.item.genres` of the time of a behaviour" in card
    assert "also in candidates: `hashed.log.slot`, `log.price`, `log.rank`." in card
    assert "Each candidate must say its `log.rank`" in card
    assert "the id of the `user`" in card


def test_a_request_may_say_all_columns_of_the_data_set_and_leave_out_what_is_not_told(data: Prepared, tmp_path: Path) -> None:
    spec = run_spec(
        data, str(tmp_path / "run"), model={"target": {"signals": ["log.price", "mean.item.genres"]}, "base": "log.rank"}
    )
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    scorer, request = Scorer.load(str(tmp_path / "out")), request_of(Dataset(data.uri), 0, 8)
    expected = scorer.score(request)
    for item in (*(behaviour["item"] for behaviour in request["history"]), *request["candidates"]):
        for name in ("hashed.log.slot", "count.item.genres"):
            item.pop(name)
    assert scorer.score(request) == expected
    for behaviour in request["history"]:
        behaviour["item"].pop("log.rank")
        behaviour["item"].pop("mean.item.genres")
    assert 0 < scorer.score(request)[0] < 1


def test_items_and_users_never_seen_are_scored(data: Prepared, tmp_path: Path) -> None:
    spec = spec_of(data, str(tmp_path / "run"), "per_target")
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    scorer, dataset = Scorer.load(str(tmp_path / "out")), Dataset(data.uri)
    request = request_of(dataset, 0, 8)
    received = ("item_mean", "item_count", "mean.item.genres", "count.item.genres", "log.price", "hashed.log.slot")
    fields = {key: value for key, value in request["candidates"][0].items() if key not in received}
    new = scorer.score({"candidates": [fields | {"id": "never seen"}], "timestamp": request["timestamp"]})
    assert 0 < new[0] < 1
    fresher = ({}, {"item_mean": 1.0, "item_count": 500}, {"mean.item.genres": 1.0}, {"genres": "never seen"}, {"log.price": 99})
    scores = [scorer.score(request | {"candidates": [fields | more]})[0] for more in fresher]
    assert len(set(scores)) == len(fresher)  # fresher statistics are believed, and so is all else
    somebody = scorer.score(request | {"user": "never seen"})[0]
    assert somebody != scorer.score(request)[0]
    assert somebody != scorer.score(request | {"user": None})[0]


def renamed(item: dict[str, Any], name: str, to: str) -> None:
    item[to] = item.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["candidates"][0].pop("id"), "candidates.0 has no field 'id'"),
        (lambda r: r["candidates"][0].pop("genres"), "candidates.0 has no field 'genres'"),
        (lambda r: r["candidates"][0].update(item_mean="high"), "candidates.0.item_mean is no number"),
        (lambda r: r["candidates"][0].update(item_count=-1), "candidates.0.item_count is below 0"),
        (lambda r: r["candidates"][0].update(item_count=10**400), "candidates.0.item_count is no number"),
        (lambda r: r["candidates"][0].update(id=269.5), "candidates.0.id: 269.5 is a floating-point number"),
        (lambda r: r["candidates"][0].update(id=[269]), "candidates.0.id: a list is no id"),
        (lambda r: r["history"][0].update(request="\ud83d"), "history.0.request: .* half a surrogate pair"),
        (lambda r: r["history"][0].update(request=True), "history.0.request"),
        (lambda r: r["history"][0].pop("label"), "history.0 has no label"),
        (lambda r: r["candidates"][0].pop("log.rank"), r"candidates.0 has no log\.rank, the logit that the model adds to"),
        (
            lambda r: renamed(r["candidates"][0], "log.rank", "log.ranker"),
            r"log\.ranker is .*: did you mean log\.rank\?",
        ),
        (
            lambda r: renamed(r["history"][0]["item"], "log.price", "Log.price"),
            r"Log\.price is .*: did you mean log\.price",
        ),
        (
            lambda r: renamed(r["candidates"][0], "hashed.log.slot", "log.slot"),
            r"log\.slot is .* mean hashed\.log\.slot",
        ),
        (
            lambda r: r["candidates"][0].update({"item.year": 1994}),
            r"0\.item\.year is no signal .*: did you mean year",
        ),
        (lambda r: renamed(r["candidates"][0], "mean.item.genres", "mean.item.genre"), r"mean\.item\.genre is no signal"),
        (lambda r: r["candidates"][0].update({"log.price": "cheap"}), "candidates.0.log.price is no number .*'cheap'"),
        (lambda r: r["candidates"][0].update({"log.price": 1e39}), "candidates.0.log.price is no number that float32 holds"),
        (lambda r: r["history"][0]["item"].update({"hashed.log.slot": {}}), "history.0.hashed.log.slot: an object is no text"),
        (lambda r: r["candidates"][0].update({"mean.item.genres": "good"}), "candidates.0.mean.item.genres is no number"),
        (lambda r: r["candidates"][0].update({"count.item.genres": -1}), "candidates.0.count.item.genres is below 0"),
        (lambda r: r.update(user=True), "request: user"),
    ],
)
def test_what_the_signals_need_is_asked_for(data: Prepared, tmp_path: Path, change: Any, message: str) -> None:
    spec = spec_of(data, str(tmp_path / "run"), "per_target")
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    scorer, dataset = Scorer.load(str(tmp_path / "out")), Dataset(data.uri)
    request = request_of(dataset, 0, 8)
    change(request)
    assert scorer.knowledge is not None
    scorer.knowledge = dataclasses.replace(scorer.knowledge, labelled=True)  # as for a log with a column of clicks
    with pytest.raises(InputError, match=message):
        scorer.score(request)


@pytest.mark.parametrize("client", [1994, 1994.0, "1994.0", "1994"], ids=repr)
def test_a_field_is_one_value_however_it_is_written(tmp_path: Path, client: Any) -> None:
    """As text is: a csv file has 1994.0, a client has the number."""
    source = sourced(tmp_path, make_events(9, 12))
    items = Path(source.items or "")
    with items.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with items.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "year of it"])
        writer.writeheader()
        writer.writerows(row | {"year of it": "1994.0" if number % 2 else "1961.0"} for number, row in enumerate(rows))
    fields = (FieldSpec(column="year of it"),)
    spec = prepare_spec(source).model_copy(update={"statistics": StatisticsSpec(period="hour", fields=fields)})
    prepare(spec, str(tmp_path / "data"))
    knowledge = Knowledge.of(Dataset(str(tmp_path / "data")), with_neighbours=False, columns=())
    item = {"id": "1", "title": "x", "year of it": client}
    request = parse_request({"candidates": [item], "timestamp": 2e9}, ["year of it"], "request")
    told = histories_of(request, np.array([2 * 10**9]), knowledge).fields
    table = Dataset(str(tmp_path / "data")).tables(0)[1]
    known = {number for row in table.column("fields").to_pylist() for number in row}
    assert told is not None
    assert len(known) == 2
    assert set(told.values.tolist()) < known
