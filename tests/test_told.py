"""What sinks and targets are told: how it starts, on every backend, and that a request scores as it was evaluated."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from ctrsink.batch import Batch
from ctrsink.config import ReadoutSpec
from ctrsink.config.data import EncoderSpec, FieldSpec, NeighboursSpec, PrepareSpec, SourceSpec, StatisticsSpec
from ctrsink.config.model import SinkSpec, TargetSpec
from ctrsink.config.train import EvaluateSpec
from ctrsink.data.columns import signal_columns
from ctrsink.data.dataset import Dataset
from ctrsink.data.knowledge import Knowledge
from ctrsink.data.layout import Layout
from ctrsink.data.manifest import read_manifest
from ctrsink.data.prepare.build import append, prepare
from ctrsink.data.stream import SequenceSource, evaluation_batches
from ctrsink.data.windows import Cuts, windows_of
from ctrsink.dist import Topology
from ctrsink.errors import InputError
from ctrsink.evaluate.evaluator import Predictions, predict
from ctrsink.export.package import export_run
from ctrsink.features.ragged import Ragged
from ctrsink.features.registry import SIGNALS, of_kind
from ctrsink.model.ctr import CTRModel
from ctrsink.model.signals import token_scale
from ctrsink.report.look import shares_of
from ctrsink.runtime.preflight import check
from ctrsink.serve import Scorer, request_of
from ctrsink.serve.requests import parse_request
from ctrsink.serve.told import histories_of
from ctrsink.train.capacity import GIB, saved_bytes, tokens_within
from ctrsink.train.restore import restore_run
from tests.builders import form_batch, tiny_model, tiny_spec
from tests.command_line import good
from tests.data_fixtures import make_events, prepare_spec, table_source, write_table
from tests.encoder_fixtures import write_encoder
from tests.serving_fixtures import Prepared, run_spec, write_run

OF_SINKS = tuple(name for name, signal in SIGNALS.items() if "behaviour" in signal.sides)
OF_TARGETS = tuple(name for name, signal in SIGNALS.items() if "target" in signal.sides)


def rms(vectors: torch.Tensor) -> float:
    return float(vectors.detach().square().mean().sqrt())


@pytest.mark.parametrize("signal", OF_SINKS)
@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_a_sink_starts_at_the_scale_of_token_embeddings(signal: str, spread: float) -> None:
    """Whatever the backbone's is."""
    sinks = SinkSpec(signals=(signal,), buckets=100, embedding_size=64)
    fields = {"hidden_size": 128, "initializer_range": spread}
    model = tiny_model(tiny_spec(fields=fields, sinks=False).model_copy(update={"sinks": sinks}))
    assert model.sinks is not None
    categories, numbers = torch.arange(100)[:, None], torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    vectors = model.sinks(categories, numbers)
    assert 0.5 < rms(vectors) / token_scale(model.backbone) < 2
    assert token_scale(model.backbone) == pytest.approx(spread, rel=0.1)


def told(batch: Batch, seed: int) -> Batch:
    """The batch with similarities and numbers of its own."""
    chance = torch.Generator().manual_seed(seed)
    shape = (*batch.asked_valid.shape, batch.sink_valid.shape[1])
    numbers = {
        name: torch.randn(*getattr(batch, of).shape, 2, generator=chance)
        for name, of in (("sink_numbers", "sink_valid"), ("asked_numbers", "asked_valid"), ("readout_numbers", "readout_valid"))
    }
    return dataclasses.replace(batch, similarity=torch.randn(shape, generator=chance) / 10, **numbers)


def told_model(attention: str, **more: Any) -> CTRModel:
    spec = tiny_spec(fields={"hidden_size": 64}, similarity="neighbours", attention=attention, **more)
    assert spec.sinks is not None
    sinks = spec.sinks.model_copy(update={"signals": ("previous_gap", "item_mean", "item_count")})
    target = TargetSpec(signals=("item_mean", "item_count"), dropout=0)
    model = tiny_model(spec.model_copy(update={"sinks": sinks, "target": target}))
    chance = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.head.parameters():  # as after training: at the start it hardly reads the state
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=chance))
    return model


def test_what_fits_into_memory_is_foreseen_for_a_head_that_is_told_numbers() -> None:
    """From a small batch: as many tokens as it says are of a larger one keep about as many bytes."""
    small, large = (told(form_batch("per_user", 3, (20,) * rows), 4) for rows in (2, 10))
    model = told_model("sdpa")
    forward = lambda batch: model(batch, ReadoutSpec())[0]  # noqa: E731
    kept = saved_bytes(lambda: forward(large), model)
    assert tokens_within(model, forward, small, kept / GIB) == pytest.approx(large.tokens, rel=0.3)


@pytest.mark.parametrize("examples", ["per_user", "per_request", "per_target"])
@pytest.mark.parametrize("more", [{}, {"temporal": True}, {"window": 3}], ids=str)
def test_every_backend_gives_the_same(examples: str, more: dict[str, Any]) -> None:
    batch = told(form_batch(examples, 3, (9, 1, 4)), 4)
    results = []
    for attention in ("sdpa", "blocks", "flex"):
        model = told_model(attention, **more)
        if more.get("temporal"):
            for bias in model.temporal:
                torch.nn.init.normal_(bias.slope, generator=torch.Generator().manual_seed(1))  # pyright: ignore[reportArgumentType]
        if attention == "flex":  # no backward pass on a CPU
            with torch.no_grad():
                results.append((model(batch, ReadoutSpec())[1], None))
            continue
        loss, logits = model(batch, ReadoutSpec())
        loss.backward()
        results.append((logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (first, gradients), *others = results
    valid = batch.readout_valid
    assert float(first[valid].std()) > 0.01
    for logits, found in others:
        torch.testing.assert_close(logits[valid], first[valid], atol=1e-5, rtol=1e-5)
        for name, gradient in (found or {}).items():
            expected = gradients[name]  # pyright: ignore[reportOptionalSubscript]
            torch.testing.assert_close(gradient, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=1e-4)


@pytest.mark.parametrize("examples", ["per_user", "per_request", "per_target"])
def test_similarity_moves_the_attention_of_those_asked_alone(examples: str) -> None:
    """With slopes of 0 it changes nothing; with others it changes logits, and a larger similarity draws attention to its sink."""
    batch = told(form_batch(examples, 3, (9, 5)), 4)
    model = told_model("sdpa")
    plain = dataclasses.replace(batch, similarity=torch.zeros_like(batch.similarity))
    with torch.no_grad():
        moved = (model(batch, ReadoutSpec())[1] - model(plain, ReadoutSpec())[1])[batch.readout_valid]
        for bias in model.similarity:
            bias.slope.zero_()  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue, reportAttributeAccessIssue]
        same = (model(batch, ReadoutSpec())[1] - model(plain, ReadoutSpec())[1])[batch.readout_valid]
    assert float(moved.abs().max()) > 1e-3
    assert float(same.abs().max()) == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A log of users who meet items again, with a field of several values and a table of neighbours."""
    return told_data(tmp_path_factory.mktemp("told"), requests=False)


@pytest.fixture(scope="module")
def asked_together(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The same, whose requests hold several events."""
    return told_data(tmp_path_factory.mktemp("together"), requests=True)


COLUMNS = ("log.price", "hashed.log.slot", "log.rank", "item.year", "hashed.item.year", "mean.item.genres", "count.item.genres")


def columned(source: SourceSpec) -> SourceSpec:
    """The log with columns of its own: a number, a category, both blank here and there, and the logit of another ranker."""
    path = Path(source.path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        time = int(row["when"])
        row["price"] = "" if time % 5 == 0 else f"{time % 97 / 8}"
        row["slot"] = ("top", " side", "", "É1")[time % 4]
        row["rank"] = "" if time % 6 == 0 else f"{time % 13 / 4 - 1.5}"
    write_table(path, rows)  # pyright: ignore[reportArgumentType]
    return source


def told_data(folder: Path, requests: bool) -> Prepared:
    source = columned(table_source(folder / "raw", make_events(9, 12)))
    if not requests:
        source = source.model_copy(update={"columns": source.columns.model_copy(update={"request": None})})
    column = "genres"
    spec = prepare_spec(source).model_copy(
        update={
            "statistics": StatisticsSpec(period="hour", fields=(FieldSpec(column=column, separator=" "),), user_events=5),
            "neighbours": NeighboursSpec(partners=3, shrink=2.0),
            "columns": COLUMNS,
        }
    )
    prepare(PrepareSpec.model_validate(spec.model_dump()), str(folder / "data"))
    return Prepared(str(folder / "data"), spec)


def test_the_bytes_do_not_depend_on_how_the_log_is_cut(data: Prepared, tmp_path: Path) -> None:
    """Statistics, neighbours and the scales of numbers among them."""
    found = []
    for block_bytes in (150, 2**20):
        uri = str(tmp_path / str(block_bytes))
        prepare(data.spec.model_copy(update={"block_bytes": block_bytes}), uri)
        files = [*read_manifest(uri).common_files, *(s.events_file for s in read_manifest(uri).shards)]
        found.append((read_manifest(uri).numbers, {file.path: file.sha256 for file in files}))
    assert found[0] == found[1]
    assert {"statistics.parquet", "neighbours.parquet"} <= set(found[0][1])
    assert found[0][0]["affinity"].deviation > 0


def test_an_append_goes_on_with_statistics_and_keeps_neighbours_and_scales(data: Prepared, tmp_path: Path) -> None:
    """What is appended knows the items' past; the table and the scales stay those that a model was trained with."""
    rows = sorted(make_events(9, 12), key=lambda event: event[3])
    whole, early, late = (tmp_path / name for name in ("whole", "early", "late"))
    spec = data.spec.model_copy(update={"past_events": 5})
    parts = {folder: spec.model_copy(update={"source": sourced(folder, own)}) for folder, own in
             ((whole, rows), (early, rows[:84]), (late, rows[84:]))}  # fmt: skip
    for folder in (whole, early):
        prepare(parts[folder], str(folder / "data"))
    before = read_manifest(str(early / "data"))
    after = append(parts[late], str(early / "data"))
    assert (after.neighbours, after.numbers) == (before.neighbours, before.numbers)
    assert after.statistics.file != before.statistics.file
    of_whole, of_parts = (statistics_of(str(folder / "data")) for folder in (whole, early))
    assert of_parts.keys() == of_whole.keys()
    for event, (mean, count) in of_whole.items():
        assert of_parts[event][1] == count
        assert of_parts[event][0] == pytest.approx(mean, abs=1e-6, nan_ok=True)


def sourced(folder: Path, events: list[Any]) -> SourceSpec:
    source = columned(table_source(folder / "raw", events))
    return source.model_copy(update={"columns": source.columns.model_copy(update={"request": None})})


def statistics_of(uri: str) -> dict[tuple[str, str, int], tuple[float, int]]:
    """Mean and count of the item of each event, and of all with its genres, by user and time; history is the same."""
    dataset = Dataset(uri)
    found = {}
    for number in range(len(dataset.manifest.shards)):
        for row in dataset.tables(number, COLUMNS)[0].to_pylist():
            for kind in ("item", "genres"):
                names = ("item_mean", "item_count") if kind == "item" else ("mean.item.genres", "count.item.genres")
                for time, mean, count in zip(row["timestamp"], *(row[name] for name in names), strict=True):
                    found[kind, row["user"], time] = (np.nan if mean is None else mean, count)
    return found


def spec_of(data: Prepared, run_dir: str, examples: str, **sequences: Any) -> Any:
    of_sinks = [name for name in OF_SINKS if examples != "per_user" or not SIGNALS[name].depends_on_target]
    of_sinks = [name for name in of_sinks if name != "similarity"]
    model = {
        "sinks": {"signals": [*of_sinks, *COLUMNS], "buckets": 30, "rows": 9, "embedding_size": 8},
        "target": {"signals": [*OF_TARGETS, *COLUMNS], "rows": 40},
        "base": "log.rank",
        "similarity": "neighbours",
        "temporal": True,
    }
    groups = ("sink", "bias", "head", "ids", "lora")
    return run_spec(data, run_dir, trainable=groups, model=model, examples=examples, **sequences)


def evaluated(run_dir: str, split: str) -> Predictions:
    run = restore_run(run_dir)
    return predict(lambda batch: run.model(batch, run.readout)[1], run.dataset, split, run.layout, EvaluateSpec(), Topology())


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


def test_what_users_thought_of_both_decides_what_is_retrieved(data: Prepared) -> None:
    """Of each target's history those of the items most similar to its own, in their order; of equally similar ones the later."""
    spec = spec_of(data, "run", "per_target", history=9, retrieve=3, retrieve_by="neighbours")
    dataset = Dataset(data.uri)
    layout = Layout.of(spec.data, spec.model, dataset.manifest)
    dataset.use(layout)
    chosen = 0
    for number in range(len(dataset.manifest.shards)):
        shard = dataset.shard(number)
        h = shard.histories
        assert h is not None
        for target in shard.impressions.tolist():
            first = max(int(h.begins[target]), int(h.begins[target] + h.known[target]) - 9)
            past = np.arange(first, h.begins[target] + h.known[target])
            assert h.items is not None
            similar = np.where(h.items[past] == h.items[target], np.inf, 0.0)
            found, values = h.similar(np.full(len(past), target), past)
            similar[found] = values
            expected = sorted(sorted(zip(-similar, -past, strict=True))[:3], key=lambda pair: -pair[1])
            cuts = Cuts([shard], np.array([1]), h.begins[[target]], Ragged.of([np.array([target])]))
            ((_, rows),) = windows_of(cuts, layout).chosen()
            assert rows.tolist() == [int(-row) for _, row in expected] + [target]
            chosen += rows[:-1].tolist() != past[-3:].tolist()
    assert chosen > 10


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


def test_where_nothing_is_known_of_any_item_all_is_finite(data: Prepared, tmp_path: Path) -> None:
    """A log within one period: no item was met in an earlier one."""
    spec = data.spec.model_copy(update={"statistics": data.spec.statistics.model_copy(update={"period": "week"})})
    events = [(user, item, rating, 10**9 + place) for place, (user, item, rating, _) in enumerate(make_events(9, 12))]
    prepare(spec.model_copy(update={"source": sourced(tmp_path, events)}), str(tmp_path / "data"))
    run = spec_of(Prepared(str(tmp_path / "data"), spec), str(tmp_path / "run"), "per_target")
    write_run(run)
    assert np.isfinite(evaluated(run.run_dir, "test").probabilities).all()


def test_what_is_appended_has_the_columns_of_the_data_set(data: Prepared, tmp_path: Path) -> None:
    """Else ratings and clicks would be averaged together, and old events be read as what they are not."""
    rows = [(user, item, rating, time + 10**8) for user, item, rating, time in make_events(9, 12)]
    source = sourced(tmp_path, rows)
    clicks = source.model_copy(update={"columns": source.columns.model_copy(update={"feedback": None, "label": "stars"})})
    with pytest.raises(
        InputError, match=r"prepare\.source\.columns\.feedback: the data set .* has one, what is appended has none"
    ):
        append(data.spec.model_copy(update={"source": clicks}), data.uri)


def test_the_base_is_what_the_log_says_in_each_sequence_and_0_where_it_says_nothing(data: Prepared) -> None:
    spec = spec_of(data, "run", "per_user", targets=4)
    dataset = Dataset(data.uri)
    layout = Layout.of(spec.data, spec.model, dataset.manifest)
    dataset.use(layout)
    logged = {}
    with Path(data.spec.source.path).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            logged[int(row["when"])] = float(row["rank"] or 0)
    assert len(set(logged.values())) > 5
    seen = 0
    for batch in evaluation_batches(SequenceSource(dataset, "test", layout), 4, 0, 1, None):
        assert batch.base is not None
        for (user, event), value in zip(
            batch.targets[batch.readout_valid].tolist(), batch.base[batch.readout_valid], strict=True
        ):
            shard, row = dataset.locate(user)
            assert float(value) == pytest.approx(logged[int(shard.timestamps[shard.offsets[row] + event])])
            seen += 1
    assert seen == dataset.manifest.splits["test"].impressions > 5


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
    scorer.score(request)


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


@pytest.mark.parametrize(("signal", "buckets"), [("hour", 23), ("weekday", 6)])
def test_a_category_fits_its_table(signal: str, buckets: int) -> None:
    with pytest.raises(ValueError, match=f"{signal} has .* values, more than buckets {buckets}"):
        SinkSpec(signals=(signal,), buckets=buckets)


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


def test_scales_are_those_of_the_neighbours_of_now(data: Prepared, tmp_path: Path) -> None:
    """Also in a process that prepared the same folder before, with other neighbours."""
    other = data.spec.model_copy(update={"neighbours": NeighboursSpec(partners=1, shrink=2.0)})
    prepare(other, str(tmp_path / "fresh"))
    for spec in (data.spec, other):
        prepare(spec, str(tmp_path / "again"), overwrite=True)
    fresh, again = (read_manifest(str(tmp_path / name)) for name in ("fresh", "again"))
    assert again.neighbours == fresh.neighbours
    assert again.numbers == fresh.numbers != read_manifest(data.uri).numbers


def test_an_append_makes_no_neighbours(data: Prepared, tmp_path: Path) -> None:
    rows = sorted(make_events(9, 12), key=lambda event: event[3])
    early, late = (
        data.spec.model_copy(update={"source": sourced(tmp_path / name, own)})
        for name, own in (("a", rows[:84]), ("b", rows[84:]))
    )
    prepare(early.model_copy(update={"neighbours": None}), str(tmp_path / "data"))
    with pytest.raises(InputError, match=r"has no table of neighbours: leave out prepare\.neighbours"):
        append(late, str(tmp_path / "data"))


def test_a_look_says_where_targets_look_and_what_signals_are_worth(data: Prepared, tmp_path: Path) -> None:
    spec = spec_of(data, str(tmp_path / "run"), "per_user", targets=3, history=4)
    write_run(spec)
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    weights = {name: value.clone() for name, value in restore_run(spec.run_dir).model.state_dict().items()}
    found = good("look", "--run", spec.run_dir, "--split", "test")
    assert set(found["signals"]) == set(of_kind((*OF_TARGETS, *COLUMNS), numbers=True))
    assert found["impressions"] == read_manifest(data.uri).splits["test"].impressions
    shares = found["attention_to_sinks"]
    assert set(shares) == {"untrained", "trained", "without_bias"}
    for layers in shares.values():
        assert layers
        assert all(0 < share <= 1 for heads in layers.values() for share in heads)
    assert shares["trained"] != shares["without_bias"]
    after = restore_run(spec.run_dir).model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert {path: path.read_bytes() for path in before} == before


def test_shares_are_means_over_the_batches_that_have_them(data: Prepared, tmp_path: Path) -> None:
    """A batch in which no target has a history yet says nothing of where targets look, and not that they do not look at sinks."""
    spec = spec_of(data, str(tmp_path / "run"), "per_target", history=4)
    write_run(spec)
    run = restore_run(spec.run_dir)
    some = list(evaluation_batches(SequenceSource(run.dataset, "test", run.layout, newest=True), 4, 0, 1, 4))
    bare = restore_run(spec.run_dir)
    none = list(evaluation_batches(SequenceSource(bare.dataset, "train", bare.layout, newest=True), 1, 0, 1, 1))
    assert int(none[0].sink_valid.sum()) == 0
    assert shares_of(run, run.model, [*some, *none]) == shares_of(run, run.model, some) != {}


@pytest.mark.parametrize(("rows", "warned"), [(6, True), (7, False)])
def test_items_that_share_an_embedding_are_warned_of(
    data: Prepared, caplog: pytest.LogCaptureFixture, rows: int, warned: bool
) -> None:
    assert Dataset(data.uri).manifest.item_count == 6
    ids = {"signals": ["item_id"], "rows": rows}
    spec = run_spec(data, "run", trainable=("sink", "bias", "head", "ids", "lora"), model={"target": ids})
    with caplog.at_level("WARNING"):
        check(spec)
    found = f"model.target.rows {rows}: some of the 6 items of {data.uri} share an embedding of item_id; from rows 7 on none does"
    assert (found in caplog.text) == warned
