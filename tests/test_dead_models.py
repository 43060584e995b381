"""A model whose weights have overflowed is no result: nothing measures, keeps, exports or scores it as if it were one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctrsink.config import RunSpec, parse_run
from ctrsink.config.train import KeepSpec
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import Diverged, InputError
from ctrsink.export.package import export_run
from ctrsink.runtime.start import start
from ctrsink.serve import Scorer, request_of, score_file
from ctrsink.train.checkpoint.checkpoint import BEST, Checkpoint, find_checkpoint, save_checkpoint
from ctrsink.train.checkpoint.retention import Keeper
from ctrsink.train.measure import evaluate_run
from tests.runs import prepared_data, run_tree
from tests.serving_fixtures import Prepared, prepared, run_spec, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("data") / "set"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("served"))


def run_with_a_last_step(data: str, run_dir: Path, rate: float, **train: Any) -> RunSpec:
    """Twenty good steps, and one whose gradient is as good, at a rate that carries every weight away."""
    tree = run_tree(data, str(run_dir), train={"keep": {"last": 1}} | train)
    last = {"name": "last", "trainable": ["head", "backbone"], "lr": {"head": rate, "backbone": rate}, "steps": 1}
    tree["stages"].append(last)
    return parse_run(tree, "test")


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_weights_that_overflow_in_the_last_step_end_the_run_before_its_checkpoint(
    data: str, tmp_path: Path, zero_stage: int
) -> None:
    """Beyond the range of fp32; the good checkpoint stays although only one is kept."""
    spec = run_with_a_last_step(data, tmp_path / "run", 1e37, zero_stage=zero_stage, weight_decay=100)
    with pytest.raises(Diverged, match=r"^rank 0, step 21, stage last, checkpoint: the weights are not finite after this step"):
        start(spec)
    kept = find_checkpoint(spec.run_dir)
    assert kept.step == 20
    assert all(value.isfinite().all() for value in kept.parameters.values())
    assert not (tmp_path / "run" / "evaluation").exists()
    assert not (tmp_path / "run" / "result.json").exists()


def test_finite_weights_whose_predictions_overflow_are_neither_measured_nor_exported(data: str, tmp_path: Path) -> None:
    spec = run_with_a_last_step(data, tmp_path / "run", 1e30)
    with pytest.raises(
        Diverged, match=r"^rank 0, step 21, stage last, evaluation: \d+ of \d+ predictions on the split valid are"
    ):
        start(spec)
    with pytest.raises(InputError, match=r"run, checkpoint of step 21: .* on the split test are not finite.*--checkpoint"):
        evaluate_run(spec.run_dir, ("test",))
    assert not list((tmp_path / "run").glob("evaluation/*"))
    with pytest.raises(InputError, match=r"the checkpoint of step 21 of .*run is no model: its predictions are not finite"):
        export_run(spec.run_dir, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("plateau", [None, {"metric": "logloss", "patience": 1}])
def test_a_dead_model_is_never_the_best_one(data: str, tmp_path: Path, plateau: dict[str, Any] | None) -> None:
    spec = run_with_a_last_step(
        data, tmp_path / "run", 1e30, validation={"every": 20, "sequences": 10}, keep={"last": 1, "best": "logloss"}
    )
    if plateau:
        tree = spec.model_dump(mode="json")
        tree["stages"][2] |= {"plateau": plateau}
        spec = parse_run(tree, "test")
    with pytest.raises(
        Diverged, match=r"^rank 0, step 21, stage last, validation: \d+ of \d+ predictions on the split valid are"
    ):
        start(spec)
    best = json.loads((tmp_path / "run" / "checkpoints" / BEST).read_bytes())
    assert best["step"] <= 20
    assert find_checkpoint(spec.run_dir, "best").step == best["step"]


def test_a_metric_without_a_value_is_null_in_the_checkpoint_and_never_the_best(tmp_path: Path) -> None:
    for step, auc in ((1, 0.6), (2, math.nan)):
        save_checkpoint(str(tmp_path), Checkpoint(step, 8 * step, {"w": torch.ones(1)}, {}, {}, "0" * 64, metrics={"auc": auc}))
    assert '"metrics": {"auc": null}' in (tmp_path / "checkpoints/step-00000002/state.json").read_text()
    Keeper(str(tmp_path), KeepSpec(last=1, best="auc")).apply(2)
    assert json.loads((tmp_path / "checkpoints" / BEST).read_bytes())["step"] == 1


def test_weights_that_are_not_finite_are_not_exported(served: Prepared, tmp_path: Path) -> None:
    spec = run_spec(served, str(tmp_path / "run"))
    write_run(spec)
    checkpoint = find_checkpoint(spec.run_dir)
    checkpoint.step = 7
    checkpoint.parameters = dict(checkpoint.parameters)
    checkpoint.parameters["sinks.categories.projection.weight"][0, 0] = math.inf
    save_checkpoint(spec.run_dir, checkpoint)
    with pytest.raises(InputError, match=r"the checkpoint of step 7 of .* its weights sinks\..* are not finite; .* --checkpoint"):
        export_run(spec.run_dir, str(tmp_path / "out"))
    assert export_run(spec.run_dir, str(tmp_path / "out"), checkpoint=5)["step"] == 5


def test_a_model_that_gives_no_probability_does_not_score(served: Prepared, tmp_path: Path) -> None:
    """One weight of a sink: requests without a history never see it."""
    spec = run_spec(served, str(tmp_path / "run"))
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["ctr.sinks.categories.projection.weight"][0, 0] = math.nan
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    asked = request_of(Dataset(served.uri), 0, 5, [0, 1])
    alone = asked | {"history": []}
    assert len(Scorer.load(str(tmp_path / "out")).score(alone)) == 2
    with pytest.raises(InputError, match=r"^request: the model's probability of candidates.0 is not finite"):
        Scorer.load(str(tmp_path / "out")).score(asked)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (alone, asked)))
    with pytest.raises(InputError, match=r"in.jsonl, line 2: the model's probability of candidates.0 is not finite"):
        score_file(str(tmp_path / "out"), str(tmp_path / "in.jsonl"), str(tmp_path / "scores.jsonl"))
    assert not (tmp_path / "scores.jsonl").exists()
