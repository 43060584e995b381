"""What sinks and targets are told: how it starts, on every backend, and what of a data set reaches a batch."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctrsink.config.data import NeighboursSpec
from ctrsink.config.model import SinkSpec, TargetSpec
from ctrsink.config.stages import Objective
from ctrsink.dataset.manifest import read_manifest
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.families.decoder.embeddings import token_scale
from ctrsink.families.decoder.look import shares_of
from ctrsink.families.decoder.model import CTRModel
from ctrsink.families.registry import source_of
from ctrsink.features.ragged import Ragged
from ctrsink.features.registry import of_kind
from ctrsink.prepare.build import append, prepare
from ctrsink.runtime.preflight import check
from ctrsink.sequences.batch import Axis, Batch
from ctrsink.sequences.windows import Cuts, windows_of
from ctrsink.stream.evaluation import evaluation_batches
from ctrsink.train.restore import restore_run
from tests.builders import form_batch, layout_on, tiny_model, tiny_spec
from tests.command_line import good
from tests.data_fixtures import make_events
from tests.padded import changed
from tests.serving_fixtures import Prepared, run_spec, write_run
from tests.told_fixtures import COLUMNS, OF_SINKS, OF_TARGETS, evaluated, sourced, spec_of, told_data


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
    numbers = {
        name: torch.randn(batch.axes[axis].total, 2, generator=chance)
        for name, axis in (("sink_numbers", "sinks"), ("asked_numbers", "asked"), ("readout_numbers", "targets"))
    }
    # Of each one asked and each sink of its sequence.
    pairs = Axis.of(batch.axes["asked"].lengths * batch.axes["sinks"].lengths)
    told = changed(batch, similarity=torch.randn(pairs.total, generator=chance) / 10, **numbers)
    return dataclasses.replace(told, axes=batch.axes | {"pairs": pairs})


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
                results.append((model(batch, Objective()).logits, None))
            continue
        out = model(batch, Objective())
        out.loss.backward()
        results.append((out.logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (first, gradients), *others = results
    assert float(first.std()) > 0.01
    for logits, found in others:
        torch.testing.assert_close(logits, first, atol=1e-5, rtol=1e-5)
        for name, gradient in (found or {}).items():
            expected = gradients[name]  # pyright: ignore[reportOptionalSubscript]
            torch.testing.assert_close(gradient, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=1e-4)


@pytest.mark.parametrize("examples", ["per_user", "per_request", "per_target"])
def test_similarity_moves_the_attention_of_those_asked_alone(examples: str) -> None:
    """With slopes of 0 it changes nothing; with others it changes logits, and a larger similarity draws attention to its sink."""
    batch = told(form_batch(examples, 3, (9, 5)), 4)
    model = told_model("sdpa")
    plain = changed(batch, similarity=torch.zeros_like(batch.inputs["similarity"]))
    with torch.no_grad():
        moved = model(batch, Objective()).logits - model(plain, Objective()).logits
        for bias in model.similarity:
            bias.slope.zero_()  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue, reportAttributeAccessIssue]
        same = model(batch, Objective()).logits - model(plain, Objective()).logits
    assert float(moved.abs().max()) > 1e-3
    assert float(same.abs().max()) == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A log of users who meet items again, with a field of several values and a table of neighbours."""
    return told_data(tmp_path_factory.mktemp("told"), requests=False)


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


def test_what_users_thought_of_both_decides_what_is_retrieved(data: Prepared) -> None:
    """Of each target's history those of the items most similar to its own, in their order; of equally similar ones the later."""
    spec = spec_of(data, "run", "per_target", history=9, retrieve=3, retrieve_by="neighbours")
    dataset = Dataset(data.uri)
    layout = layout_on(spec.data, spec.model, dataset.manifest)
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
    layout = layout_on(spec.data, spec.model, dataset.manifest)
    dataset.use(layout)
    logged = {}
    with Path(data.spec.source.path).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            logged[int(row["when"])] = float(row["rank"] or 0)
    assert len(set(logged.values())) > 5
    seen = 0
    for batch in evaluation_batches(source_of(dataset, "test", layout), 4, 0, 1, None):
        of, base = batch.targets, batch.inputs["base"]
        columns = (column[of.counted].tolist() for column in (of.users, of.events, base))
        for user, event, value in zip(*columns, strict=True):
            shard, row = dataset.locate(user)
            assert value == pytest.approx(logged[int(shard.timestamps[shard.offsets[row] + event])])
            seen += 1
    assert seen == dataset.manifest.splits["test"].impressions > 5


@pytest.mark.parametrize(("signal", "buckets"), [("hour", 23), ("weekday", 6)])
def test_a_category_fits_its_table(signal: str, buckets: int) -> None:
    with pytest.raises(ValueError, match=f"{signal} has .* values, more than buckets {buckets}"):
        SinkSpec(signals=(signal,), buckets=buckets)


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
    some = list(evaluation_batches(source_of(run.dataset, "test", run.layout, newest=True), 4, 0, 1, 4))
    bare = restore_run(spec.run_dir)
    none = list(evaluation_batches(source_of(bare.dataset, "train", bare.layout, newest=True), 1, 0, 1, 1))
    assert none[0].axes["sinks"].total == 0
    assert shares_of(run.model, [*some, *none], run.objective) == shares_of(run.model, some, run.objective) != {}


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
