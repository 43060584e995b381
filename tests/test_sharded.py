"""Runs whose tables of ids are sharded, outside DeepSpeed: trained, resumed, frozen, damaged, exported; in one process."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn

from ctrsink import storage
from ctrsink.config import RunSpec, parse_run
from ctrsink.dataset.reader import Dataset
from ctrsink.dist import Topology
from ctrsink.errors import InputError, RunError
from ctrsink.export.package import export_run
from ctrsink.families.facts import Facts
from ctrsink.families.registry import family_of
from ctrsink.report.look import look
from ctrsink.runtime.start import start
from ctrsink.serve import Scorer, request_of
from ctrsink.tables.embedding import ShardedEmbedding
from ctrsink.tables.table import EPSILON, RowTable
from ctrsink.train.checkpoint.checkpoint import MARKER, Checkpoint, find_checkpoint, folder_of, list_checkpoints
from ctrsink.train.engine import Engine
from ctrsink.train.measure import evaluate_run
from ctrsink.train.observe.telemetry import read_metrics
from ctrsink.train.restore import restore_run
from tests.builders import random_chronology
from tests.ids_fixtures import ids_batch
from tests.runs import prepared_data
from tests.sharded_ranks import CUT, STEPS, tree

NAMES = ("embedding.ids.item__id", "embedding.ids.user__id")
FACTS = Facts(vocabulary=97)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("sharded") / "data"))


def spec_of(data: str, run_dir: Path, name: str = "din", **changes: Any) -> RunSpec:
    return parse_run(tree(data, str(run_dir), name, **changes), "test")


def checkpoint(run_dir: Path, step: int | None = None) -> Checkpoint:
    return find_checkpoint(str(run_dir), step, Topology())


def losses(run_dir: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(str(run_dir))]


def same(a: Checkpoint, b: Checkpoint) -> bool:
    tables = [({n: t.values for n, t in c.tables.items()}, {n: t.squares for n, t in c.tables.items()}) for c in (a, b)]
    pairs = [(a.parameters, b.parameters), (a.moments, b.moments), *zip(*tables, strict=True)]
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


# One process


@pytest.mark.parametrize("cut", [2, CUT])
def test_a_resumed_run_equals_the_whole_one_bitwise(data: str, tmp_path: Path, cut: int) -> None:
    """With dropout, cut in a stage that trains ids and in one that does not."""
    dropout = {"model": {"dropout": 0.1, "id_dropout": 0.1}}
    start(spec_of(data, tmp_path / "straight", **dropout))
    assert not start(spec_of(data, tmp_path / "cut", **dropout), stop_after=cut)["finished"]
    assert start(spec_of(data, tmp_path / "cut", **dropout), resume=True)["steps"] == STEPS
    assert losses(tmp_path / "straight") == losses(tmp_path / "cut")
    a, b = checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "cut")
    assert tuple(a.tables) == NAMES
    assert same(a, b)
    assert not any(".ids." in name for name in a.parameters)


def test_a_stage_that_does_not_train_ids_leaves_them_and_their_state_alone(data: str, tmp_path: Path) -> None:
    start(spec_of(data, tmp_path / "run"))
    before, frozen, after = (checkpoint(tmp_path / "run", step).tables for step in (3, 5, STEPS))
    for name in NAMES:
        assert torch.equal(before[name].values, frozen[name].values)
        assert torch.equal(before[name].squares, frozen[name].squares)
        touched = before[name].squares > 0
        assert touched.any()
        assert (after[name].squares >= before[name].squares).all()
        assert (after[name].squares > before[name].squares).any()
        assert not torch.equal(after[name].values, before[name].values)


@pytest.mark.parametrize("name", ["din", "hstu", "sparse"])
def test_an_exported_model_scores_what_evaluation_measured(name: str, data: str, tmp_path: Path) -> None:
    spec = spec_of(data, tmp_path / "run", name)
    result = start(spec)
    assert evaluate_run(spec.run_dir, ("test",))["test"]["auc"] == pytest.approx(result["evaluation"]["test"]["auc"])
    assert look(spec.run_dir)["signals"]
    run = restore_run(spec.run_dir)
    exported = export_run(spec.run_dir, str(tmp_path / "model"))
    scorer = Scorer.load(exported["model"])
    assert not any(isinstance(part, ShardedEmbedding) for part in scorer.model.modules())
    assert '"id_tables": "dense"' in (tmp_path / "model/config.json").read_text()
    dataset = Dataset(data)
    index = {str(dataset.locate(row)[0].users[dataset.locate(row)[1]]): row for row in range(len(dataset.index["row"]))}
    measured = pq.read_table(tmp_path / "run/evaluation/test.parquet").to_pydict()
    for user, event, expected in list(zip(measured["user"], measured["event"], measured["probability"], strict=True))[:12]:
        (found,) = scorer.score(request_of(dataset, index[user], event))
        assert found == pytest.approx(expected, abs=1e-5)
    assert run.model.embedding.table("item_id").table.rows == 60


def reference(spec: RunSpec, batches: list[Any], steps: int) -> tuple[nn.Module, list[float]]:
    """The model and the gradients' norms of as many steps by plain torch, with whole tables."""
    model: Any = family_of("din").build(spec.model, FACTS, spec.seed).eval()
    model.embedding.unshard()
    tables = [part.weight for part in model.embedding.ids.values()]
    dense = {name: p for name, p in model.named_parameters() if all(p is not table for table in tables)}
    decays = [
        {"params": [p], "weight_decay": spec.train.weight_decay if model.decays(name, p.dim()) else 0.0}
        for name, p in dense.items()
    ]
    optimizer = torch.optim.AdamW(decays, lr=0.01, betas=spec.train.betas, eps=1e-8)
    squares = [torch.zeros(len(table)) for table in tables]
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        model.zero_grad()
        units = sum(batch.impressions for batch in batches)
        sum(model(batch, spec.stages[0].learns).loss / units for batch in batches).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), spec.train.clip_norm)))
        optimizer.step()
        with torch.no_grad():
            for table, square in zip(tables, squares, strict=True):
                square += table.grad.square().mean(1)
                table -= 0.05 * table.grad / (square.sqrt() + EPSILON)[:, None]
    return model, norms


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group of one, as the local runtime makes it."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def small(zero: int, **train: Any) -> tuple[RunSpec, list[Any]]:
    """A run that is not on disk, and two batches of it."""
    model = {"behaviours": ["item_id", "feedback", "deviation"], "target": ["item_id", "hour", "item_mean"], "rows": 9}
    spec = spec_of("unused", Path("unused"), model=model, train={"zero_stage": zero} | train)
    chance = np.random.default_rng(3)
    return spec, [
        ids_batch(spec.model, "per_target", [random_chronology(chance, n) for n in lengths]) for lengths in ((5, 3), (4,))
    ]


def engine_of(spec: RunSpec) -> Engine:
    return Engine(family_of("din").build(spec.model, FACTS, spec.seed).eval(), spec, spec.stages[0], Topology(), None)


def step(engine: Engine, spec: RunSpec, batches: list[Any]) -> float:
    return engine.step(batches, sum(batch.impressions for batch in batches), spec.stages[0], 1.0).grad_norm


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of all that a step changes."""
    state = engine.state()
    tables = {f"{n}/{key}": getattr(t, key).clone() for n, t in engine.tables.all.items() for key in ("values", "squares")}
    return state.parameters | state.moments | {k: torch.tensor(n) for k, n in state.steps.items()} | tables


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("clip_norm", [0.05, 100.0])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_tables_and_all_else_are_clipped_by_the_norm_of_both(zero: int, clip_norm: float) -> None:
    spec, batches = small(zero, clip_norm=clip_norm)
    engine = engine_of(spec)
    norms = [step(engine, spec, batches) for _ in range(3)]
    expected: Any
    expected, told = reference(spec, batches, 3)
    np.testing.assert_allclose(norms, told, rtol=1e-4)
    assert all(norm > 0.05 for norm in norms)
    found = engine.state().parameters
    for name, value in found.items():
        torch.testing.assert_close(value, dict(expected.named_parameters())[name].detach(), rtol=1e-4, atol=1e-5)
    for key, part in expected.embedding.ids.items():
        vectors = engine.model.embedding.ids[key].vectors(range(-1, 8))
        torch.testing.assert_close(vectors, part.weight.detach(), rtol=1e-4, atol=1e-5)
    engine.destroy()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_gradient_that_is_bad_in_tables_alone_changes_nothing(zero: int, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step then goes as if that one had never been."""
    spec, batches = small(zero)
    collect, poisoned = RowTable.collect, [False]

    def poison(table: RowTable, divisor: float) -> None:
        collect(table, divisor)
        if poisoned[0]:
            assert table._collected is not None
            table._collected[1][0, 0] = bad

    monkeypatch.setattr(RowTable, "collect", poison)

    def states(steps: list[bool]) -> list[dict[str, torch.Tensor]]:
        engine, found = engine_of(spec), []
        for poisoned[0] in steps:
            assert math.isfinite(step(engine, spec, batches)) != poisoned[0]
            found.append(state_of(engine))
        engine.destroy()
        return found

    with_bad, without = states([False, True, False]), states([False, False])
    for a, b in ((with_bad[1], with_bad[0]), (with_bad[2], without[1])):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("group")
def test_a_table_that_overflowed_is_seen() -> None:
    spec, _ = small(2)
    engine = engine_of(spec)
    assert engine.is_finite()
    engine.tables.all[NAMES[0]].put(3, torch.full((1, 32), math.inf))
    assert not engine.is_finite()
    engine.destroy()


# Checkpoints


def alter(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])


@pytest.fixture(scope="module")
def trained(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    start(spec_of(data, run_dir))
    return run_dir


@pytest.mark.parametrize("damage", [alter, lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
def test_a_damaged_table_makes_the_checkpoint_before_it_be_taken(
    trained: Path, tmp_path: Path, damage: Callable[[Path], object], heard: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    table = Path(folder_of(str(run), STEPS)) / "tables" / NAMES[1]
    (file,) = table.iterdir()
    damage(file)
    assert restore_run(str(run)).checkpoint.step == 6
    assert file.name in heard.text
    assert "looking for one before it" in heard.text
    with pytest.raises(InputError, match="is damaged"):
        restore_run(str(run), STEPS)
    spec = parse_run(yaml.safe_load((run / "config.yaml").read_text()) | {"run_dir": str(run)}, "test")
    assert start(spec, resume=True)["steps"] == STEPS
    assert same(checkpoint(run), checkpoint(trained))
    assert losses(run) == losses(trained)


def test_a_marker_without_tables_does_not_fit_the_model(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    marker = Path(folder_of(str(run), STEPS)) / MARKER
    entries = json.loads(marker.read_text())
    marker.write_text(json.dumps({name: entry for name, entry in entries.items() if not name.startswith("tables/")}))
    with pytest.raises(InputError, match=f"the table {NAMES[0]} is here and not there"):
        restore_run(str(run))


def test_a_checkpoint_that_is_deleted_takes_its_tables_along(data: str, tmp_path: Path) -> None:
    start(spec_of(data, tmp_path / "run", train={"keep": {"last": 1, "best": "logloss"}}))
    kept = [Path(folder) for folder in list_checkpoints(str(tmp_path / "run"))]
    assert len(kept) <= 2
    assert sorted(path.parent.name for path in (tmp_path / "run/checkpoints").rglob("tables")) == sorted(p.name for p in kept)


def test_a_full_disk_is_survived_and_the_last_checkpoint_tried_again(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    write, failed = storage.write_bytes, set()

    def full(uri: str, content: Any) -> None:
        folder = uri.rpartition("/tables/")[0]
        if folder.endswith(("04", "08")) and folder not in failed:
            failed.add(folder)
            raise RunError(f"{uri}: no space left on device")
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", full)
    start(spec_of(data, tmp_path / "run"))
    assert [Path(folder).name[-1] for folder in list_checkpoints(str(tmp_path / "run"))] == ["8", "6", "5", "3", "2"]
    assert heard.text.count("was not saved, training goes on") == 2
    assert checkpoint(tmp_path / "run").step == STEPS


# Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"id_tables": "split"}}, "model.id_tables: 'split' is not allowed"),
        ({"model": {"behaviours": ["feedback"], "target": ["hour"]}}, "no signal is item_id or user_id"),
        ({"model": {"rows": 2**31 + 1}}, "model.rows 2147483649: a sharded table has at most 2147483648"),
        (
            {"stages": [{"name": "a", "trainable": ["ids"], "lr": {"ids": 0.1}, "steps": 1}]},
            "stages.a: trains sharded tables alone",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*$") as caught:
        parse_run(tree("data", "run", **changes), "test")
    assert message in str(caught.value)


def test_a_family_that_foretells_ids_refuses() -> None:
    found = tree("data", "run", "srp", stages=tree("", "", "srp")["stages"])
    with pytest.raises(InputError, match=r"^test: model\.id_tables sharded: the family srp foretells ids.*: take dense$"):
        parse_run(found, "test")
