"""What ends a run before its end, or tries to: requests to stop, SIGTERM, gradients that are not finite, failures of a rank."""

import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from ctrsink.config import RunSpec, parse_run
from ctrsink.dataset.reader import Dataset
from ctrsink.dist import Topology
from ctrsink.errors import Diverged, InputError, RunError
from ctrsink.families.decoder.build import build_model
from ctrsink.families.protocol import Out
from ctrsink.families.registry import source_of
from ctrsink.run.folder import read_result, request_stop
from ctrsink.runtime.start import start
from ctrsink.sequences.batch import Batch
from ctrsink.stream.order import Order
from ctrsink.train.checkpoint.checkpoint import find_checkpoint, list_checkpoints
from ctrsink.train.engine import Engine
from ctrsink.train.loop import Trainer
from ctrsink.train.observe.audit import Audit, expected
from ctrsink.train.observe.telemetry import read_metrics
from tests.builders import layout_of, layout_on, random_batch
from tests.command_line import call, refused
from tests.runs import prepared_data, run_tree, train_process


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("data") / "set"))


def spec_of(data: str, run_dir: Path, **changes: Any) -> RunSpec:
    return parse_run(run_tree(data, str(run_dir), **changes), "test")


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(str(run_dir))]


def expected_of(spec: RunSpec, position: int) -> Audit:
    """What the data set says that a run must have trained on when its stream stands at `position`."""
    dataset = Dataset(spec.data.uri, 8)
    source = source_of(dataset, "train", layout_on(spec.data, spec.model, dataset.manifest))
    return expected(source, Order(source.per_shard, spec.seed, spec.data.shuffle_shards), 0, position)


def audit_of(result: dict[str, Any]) -> Audit:
    return Audit(result["impressions"], int(result["checksum"], 16))


def test_a_run_tells_exactly_what_it_trained_on(data: str, tmp_path: Path) -> None:
    """Cut in two, with other micro-batches behind the cut: the multiset is that of the data set's own order."""
    spec = spec_of(data, tmp_path / "run")
    start(spec, stop_after=7)
    result = start(spec_of(data, tmp_path / "run", train={"micro_batch_tokens": 150}), resume=True)
    position = find_checkpoint(str(tmp_path / "run")).position
    assert audit_of(result) == expected_of(spec, position)
    assert audit_of(result) != expected_of(spec, position - 1)


def test_one_impression_for_another_is_noticed() -> None:
    batch = random_batch(1, layout_of(), (5, 4))
    of = batch.targets
    swapped = replace(batch, targets=replace(of, users=of.events, events=of.users))
    assert Audit.of([swapped]).impressions == Audit.of([batch]).impressions
    assert Audit.of([swapped]) != Audit.of([batch])
    assert Audit.of([batch, batch]) == Audit.of([batch]) + Audit.of([batch])


@pytest.mark.parametrize("how", ["SIGTERM", "ctrsink stop"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bitwise(data: str, tmp_path: Path, how: str) -> None:
    process = train_process(tmp_path, data)
    if how == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        assert call("stop", "--run", tmp_path / "run").code == 0
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f'"stopped": "{how}"' in output
    steps = read_result(str(tmp_path / "run"))["steps"]
    assert steps >= 15
    assert find_checkpoint(str(tmp_path / "run")).step == steps
    # What was not asked to stop went the same way.
    tree = run_tree(data, str(tmp_path / "straight"))
    tree["stages"][1]["steps"] = 100_000
    (tmp_path / "straight.yaml").write_text(yaml.safe_dump(tree))
    # In a new process too: one that has trained before may round the last bit in another way.
    verb = [sys.executable, "-m", "ctrsink", "train", "--config", str(tmp_path / "straight.yaml"), "--stop-after", str(steps)]
    assert subprocess.run(verb, check=False, capture_output=True).returncode == 0
    assert losses(tmp_path / "straight") == losses(tmp_path / "run")[:steps]
    a, b = (find_checkpoint(str(tmp_path / name)) for name in ("straight", "run"))
    assert all(torch.equal(a.parameters[name], b.parameters[name]) for name in a.parameters)


def test_a_request_to_stop_is_of_one_start_only(data: str, tmp_path: Path) -> None:
    start(spec_of(data, tmp_path / "run"), stop_after=2)
    request_stop(str(tmp_path / "run"), "too late: the run had ended")
    assert start(spec_of(data, tmp_path / "run"), resume=True)["finished"]
    refused(call("stop", "--run", tmp_path / "nothing"), "holds no run")


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group of one, as the local runtime makes it."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(data: str, tmp_path: Path, zero_stage: int) -> None:
    """A label that is no number, in one of two micro-batches; the next step then goes as if that one had never been."""
    spec = spec_of(data, tmp_path / "run", train={"zero_stage": zero_stage})
    stage = spec.stages[1]
    good = [random_batch(seed, layout_of(), (5, 4)) for seed in (1, 2)]
    bad = replace(good[1], targets=replace(good[1].targets, labels=good[1].targets.labels * math.nan))

    def states(steps: list[list[Batch]]) -> list[dict[str, torch.Tensor]]:
        engine = Engine(build_model(spec.model, 97, 1).eval(), spec, stage, Topology(), None)
        found = []
        for batches in steps:
            result = engine.step(batches, sum(b.impressions for b in batches), stage, 1.0)
            assert math.isfinite(result.grad_norm) == all(batch is not bad for batch in batches)
            state = engine.state()
            found.append(state.parameters | state.moments | {k: torch.tensor(n) for k, n in state.steps.items()})
        engine.destroy()
        return found

    with_bad = states([good, [good[0], bad], good])
    without = states([good, good])
    for a, b in ((with_bad[1], with_bad[0]), (with_bad[2], without[1])):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def poison(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Make the loss of these forward passes NaN."""
    forward, passes = Engine.forward, iter(range(1000))

    def poisoned(self: Engine, batch: Batch, objective: Any) -> Out:
        out = forward(self, batch, objective)
        return out._replace(loss=out.loss * math.nan) if next(passes) // 2 in steps else out

    monkeypatch.setattr(Engine, "forward", poisoned)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_shards(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(4, 5))
    said = (
        r"rank 0, step 5, stage align, shards/0000\d\.parquet.*: the loss is nan, the gradient's norm .*train.on_nonfinite=skip"
    )
    with pytest.raises(Diverged, match=said):
        start(spec_of(data, tmp_path / "run", train={"checkpoint_every": 2}))
    assert find_checkpoint(str(tmp_path / "run")).step == 4
    monkeypatch.undo()
    assert start(spec_of(data, tmp_path / "run", train={"checkpoint_every": 2}), resume=True)["finished"]


def test_a_loss_that_is_not_finite_is_left_out_by_policy(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(data, tmp_path / "run", train={"on_nonfinite": "skip"})
    poison(monkeypatch, range(4, 6))
    result = start(spec)
    assert result["finished"]
    found = losses(tmp_path / "run")
    assert [step for step, loss in enumerate(found) if loss is None or not math.isfinite(loss)] == [4, 5]
    batch = spec.train.batch_size
    left_out = expected_of(spec, 6 * batch).impressions - expected_of(spec, 4 * batch).impressions
    assert result["skipped"] == left_out
    assert result["impressions"] == expected_of(spec, 20 * batch).impressions - left_out


def test_a_run_that_stays_not_finite_ends_whatever_the_policy(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, range(2, 1000))
    with pytest.raises(Diverged, match=r"step 13, .* and so were 10 steps before"):
        start(spec_of(data, tmp_path / "run", train={"on_nonfinite": "skip"}))


def test_a_failure_in_a_step_names_rank_step_stage_and_shard(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Engine, batch: Batch, objective: Any) -> None:
        raise ZeroDivisionError("nothing to divide by")

    monkeypatch.setattr(Engine, "forward", broken)
    with pytest.raises(RunError, match=r"rank 0, step 1, stage align, shards/.*: ZeroDivisionError: nothing to divide by"):
        start(spec_of(data, tmp_path / "run"))


@pytest.mark.parametrize(
    ("broken", "where"),
    [
        ("_engine_for", "rank 0, step 0, stage align, start of the stage"),
        ("_report", "rank 0, step 1, stage align, report"),
        ("_validate", "rank 0, step 1, stage align, validation"),
        ("_checkpoint", "rank 0, step 5, stage align, checkpoint"),
        ("evaluate", "rank 0, step 20, stage all, evaluation"),
    ],
)
def test_a_failure_between_steps_names_rank_step_and_stage(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, where: str
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("nothing to divide by")

    monkeypatch.setattr(Trainer, broken, fail)
    with pytest.raises(RunError, match=f"^{where}: ZeroDivisionError: nothing to divide by"):
        start(spec_of(data, tmp_path / "run", train={"checkpoint_every": 5}))


def test_a_shard_that_was_altered_stops_the_run_with_its_name(tmp_path: Path) -> None:
    data = prepared_data(str(tmp_path / "set"))
    for shard in (tmp_path / "set/shards").glob("0000?.parquet"):
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"rank 0, step 1, stage align, .*shards/0000\d\.parquet"):
        start(spec_of(data, tmp_path / "run"))
    assert list_checkpoints(str(tmp_path / "run")) == []


def test_full_fine_tuning_under_zero3_with_offload_follows_a_stage_that_left_the_backbone_alone(
    data: str, tmp_path: Path
) -> None:
    """The first stage leaves every frozen weight as it was, bit for bit; the last trains all of them, and equals ZeRO 2."""
    plain = {"model": {"backbone": {"config": {"attention_dropout": 0.0}}}}
    spec = spec_of(data, tmp_path / "three", **plain, train={"zero_stage": 3, "offload": True})
    start(spec, stop_after=8)
    before = dict(build_model(spec.model, 300, spec.seed).named_parameters())
    after = find_checkpoint(str(tmp_path / "three")).parameters
    assert not any(name.startswith("backbone.") for name in after)
    start(spec, resume=True)
    trained = find_checkpoint(str(tmp_path / "three")).parameters
    assert trained.keys() == before.keys()
    start(spec_of(data, tmp_path / "two", **plain, train={"zero_stage": 2}))
    torch.testing.assert_close(losses(tmp_path / "three"), losses(tmp_path / "two"), atol=1e-5, rtol=0)


def test_micro_batches_that_fit_the_memory_do_not_change_the_losses(data: str, tmp_path: Path) -> None:
    plain = {"model": {"backbone": {"config": {"attention_dropout": 0.0}}}}
    start(spec_of(data, tmp_path / "plain", **plain))
    train = {"micro_batch_tokens": "auto", "memory_gib": 0.0005}
    start(spec_of(data, tmp_path / "auto", **plain, train=train))
    torch.testing.assert_close(losses(tmp_path / "auto"), losses(tmp_path / "plain"), atol=1e-5, rtol=0)


def test_a_plateau_ends_the_stage_and_a_run_cut_there_goes_on_bitwise(data: str, tmp_path: Path) -> None:
    """Validation every second step, and so much improvement asked for that the first stage ends with its patience."""
    changes: dict[str, Any] = {"train": {"validation": {"every": 2, "sequences": 10}}}

    def spec(name: str) -> RunSpec:
        tree = run_tree(data, str(tmp_path / name), **changes)
        tree["stages"][0] |= {"steps": 100, "plateau": {"metric": "logloss", "patience": 2, "min_delta": 1.0}}
        return parse_run(tree, "test")

    start(spec("whole"))
    rows = read_metrics(str(tmp_path / "whole"))
    # The first validation is the best so far, two more bring nothing.
    assert [row["stage"] for row in rows] == ["align"] * 6 + ["all"] * 12
    assert [row["step"] for row in rows if "valid/auc" in row] == list(range(2, 19, 2))
    for cut in (3, 6, 7):
        start(spec(f"cut-{cut}"), stop_after=cut)
        start(spec(f"cut-{cut}"), resume=True)
        again = read_metrics(str(tmp_path / f"cut-{cut}"))
        for key in ("loss", "stage", "valid/auc", "lr/head"):
            assert [row.get(key) for row in again] == [row.get(key) for row in rows], (cut, key)


def test_what_stays_trainable_keeps_its_moments_when_all_is_trained(data: str, tmp_path: Path) -> None:
    spec = spec_of(data, tmp_path / "run", train={"zero_stage": 3})
    start(spec, stop_after=8)
    before = find_checkpoint(str(tmp_path / "run"))
    start(spec, resume=True, stop_after=1)
    after = find_checkpoint(str(tmp_path / "run"))
    assert after.steps["head/decay"] == before.steps["head/decay"] + 1
    beta = spec.train.betas[1]
    key = "head.linear.weight/exp_avg_sq"
    assert (after.moments[key] >= beta * before.moments[key] - 1e-12).all()
