"""Training for real, in one process: stages, ZeRO stages, checkpoints, and a run cut in two that equals the whole one bitwise."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ctrsink.config import RunSpec, parse_run
from ctrsink.errors import InputError
from ctrsink.runtime.start import start
from ctrsink.train.checkpoint.checkpoint import Checkpoint, find_checkpoint, list_checkpoints
from ctrsink.train.measure import evaluate_run
from ctrsink.train.observe.telemetry import read_metrics
from tests.runs import prepared_data, run_tree


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("data") / "set"))


def spec_of(data: str, run_dir: Path, **changes: Any) -> RunSpec:
    return parse_run(run_tree(data, str(run_dir), **changes), "test")


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(str(run_dir))]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def checkpoint(run_dir: Path) -> Checkpoint:
    return find_checkpoint(str(run_dir))


@pytest.mark.parametrize("cut", [4, 10])
def test_resumed_run_equals_the_whole_one_bitwise(data: str, tmp_path: Path, cut: int) -> None:
    """20 steps straight and cut + resume + the rest, with dropout, over a stage boundary at step 8 and an epoch's end."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    start(spec_of(data, straight))
    first = start(spec_of(data, resumed), stop_after=cut)
    assert (first["steps"], first["finished"]) == (cut, False)
    second = start(spec_of(data, resumed), resume=True)
    assert (second["steps"], second["finished"]) == (20, True)
    assert len(losses(straight)) == 20
    assert losses(straight) == losses(resumed)
    a, b = checkpoint(straight), checkpoint(resumed)
    assert a.position == b.position
    assert a.steps == b.steps
    assert same(a.parameters, b.parameters)
    assert same(a.moments, b.moments)


def test_checkpoint_inside_an_epoch_is_taken_up_after_a_crash(data: str, tmp_path: Path) -> None:
    """What was logged after the last checkpoint is trained again and logged once."""
    run_dir = tmp_path / "run"
    start(spec_of(data, run_dir, train={"checkpoint_every": 5}), stop_after=7)
    newest = list_checkpoints(str(run_dir))[0]
    (Path(newest) / "complete.json").unlink()
    start(spec_of(data, run_dir, train={"checkpoint_every": 5}), resume=True)
    assert [row["step"] for row in read_metrics(str(run_dir))] == list(range(1, 21))
    straight = tmp_path / "straight"
    start(spec_of(data, straight))
    assert losses(straight) == losses(run_dir)


def test_stage_trains_what_it_names_and_nothing_else(data: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    start(spec_of(data, run_dir), stop_after=8)
    align = checkpoint(run_dir)
    assert {name.split(".")[0] for name in align.parameters} == {"sinks", "biases", "head"}
    assert set(align.steps) == {"sink/decay", "sink/plain", "bias/decay", "bias/plain", "head/decay", "head/plain"}
    assert set(align.steps.values()) == {8}
    start(spec_of(data, run_dir), resume=True)
    full = checkpoint(run_dir)
    assert any(name.startswith("backbone.") for name in full.parameters)
    # What stays trainable goes on; what is new begins.
    assert full.steps["sink/decay"] == 20
    assert full.steps["backbone/decay"] == 12
    assert all(value.abs().max() > 0 for name, value in full.moments.items() if name.endswith("exp_avg_sq"))


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"zero_stage": 0}},
        {"train": {"zero_stage": 1}},
        {"train": {"zero_stage": 3}},
        {"train": {"micro_batch_size": 2}},
        {"train": {"micro_batch_tokens": 150}},
        {"train": {"micro_batch_tokens": 150, "zero_stage": 3}},
    ],
)
def test_zero_stage_and_accumulation_do_not_change_the_losses(data: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    plain = {"model": {"backbone": {"config": {"attention_dropout": 0.0}}}}
    start(spec_of(data, tmp_path / "two", **plain))
    result = start(spec_of(data, tmp_path / "other", **plain, **changes))
    torch.testing.assert_close(losses(tmp_path / "other"), losses(tmp_path / "two"), atol=1e-5, rtol=0)
    a, b = checkpoint(tmp_path / "two"), checkpoint(tmp_path / "other")
    assert {n: v.shape for n, v in a.parameters.items()} == {n: v.shape for n, v in b.parameters.items()}
    assert result["evaluation"]["test"]["impressions"] > 0


def test_zero3_checkpoint_goes_on_under_zero2(data: str, tmp_path: Path) -> None:
    plain = {"model": {"backbone": {"config": {"attention_dropout": 0.0}}}}
    start(spec_of(data, tmp_path / "straight", **plain))
    start(spec_of(data, tmp_path / "moved", **plain, train={"zero_stage": 3}), stop_after=13)
    start(spec_of(data, tmp_path / "moved", **plain, train={"zero_stage": 2}), resume=True)
    torch.testing.assert_close(losses(tmp_path / "moved"), losses(tmp_path / "straight"), atol=1e-5, rtol=0)


def test_lora_stage_leaves_the_backbone_alone_and_learns(data: str, tmp_path: Path) -> None:
    changes = {
        "model": {"lora": {"rank": 2}},
        "stages": [
            {
                "name": "lora",
                "trainable": ["sink", "bias", "head", "lora"],
                "lr": dict.fromkeys(["sink", "bias", "head", "lora"], 0.01),
                "steps": 30,
            }
        ],
    }
    run_dir = tmp_path / "run"
    start(spec_of(data, run_dir, **changes))
    names = checkpoint(run_dir).parameters
    assert all(".lora_" in name or not name.startswith("backbone.") for name in names)
    assert all(value.abs().max() > 0 for name, value in names.items() if ".lora_B" in name)
    found = losses(run_dir)
    assert sum(found[-5:]) < sum(found[:5])


def test_evaluation_of_the_run_and_of_its_checkpoint_agree(data: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = start(spec_of(data, run_dir))
    again = evaluate_run(str(run_dir), ("valid", "test"))
    for split in ("valid", "test"):
        assert again[split]["auc"] == pytest.approx(result["evaluation"][split]["auc"], abs=1e-9)
        assert again[split]["logloss"] == pytest.approx(result["evaluation"][split]["logloss"], abs=1e-6)


def test_run_folder_of_another_configuration_is_refused(data: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    start(spec_of(data, run_dir), stop_after=1)
    with pytest.raises(InputError, match="already holds a run: give --resume"):
        start(spec_of(data, run_dir))
    with pytest.raises(InputError, match=r"train\.weight_decay was 0\.01, is 0\.5"):
        start(spec_of(data, run_dir, train={"weight_decay": 0.5}), resume=True)
    with pytest.raises(InputError, match="already holds a run"):
        start(spec_of(data, run_dir, seed=5))


def test_bf16_trains(data: str, tmp_path: Path) -> None:
    result = start(spec_of(data, tmp_path / "run", train={"precision": "bf16"}))
    assert result["finished"]
    assert all(value.dtype == torch.float32 for value in checkpoint(tmp_path / "run").parameters.values())


def test_run_goes_on_only_on_its_own_data(data: str, tmp_path: Path) -> None:
    other = prepared_data(str(tmp_path / "other"), users=31)
    start(spec_of(data, tmp_path / "run"), stop_after=2)
    with pytest.raises(InputError, match="was trained on another data set"):
        start(spec_of(other, tmp_path / "run"), resume=True)
