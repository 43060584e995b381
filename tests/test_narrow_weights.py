"""Weights in bfloat16 with fp32 copies of them in the optimiser: what a checkpoint holds is exact, whatever the ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ctrsink.config import RunSpec, parse_run
from ctrsink.errors import InputError
from ctrsink.estimate.held import GRADIENT, MASTER, MOMENTS, held
from ctrsink.estimate.weights import weights_of
from ctrsink.families.facts import Facts
from ctrsink.families.registry import family_of
from ctrsink.runtime.start import start
from ctrsink.train.checkpoint.checkpoint import find_checkpoint
from ctrsink.train.engine import Engine
from ctrsink.train.observe.telemetry import read_metrics
from tests.runs import prepared_data, run_tree

FULL = "sink", "bias", "head", "backbone"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("narrow") / "set"))


def spec_of(data: str, run_dir: Path, **train: Any) -> RunSpec:
    tree = run_tree(data, str(run_dir), train={"precision": "bf16", "weights": "bf16"} | train)
    tree["model"]["backbone"]["config"]["attention_dropout"] = 0.0
    tree["stages"][0]["steps"], tree["stages"][1]["steps"] = 2, 6
    return parse_run(tree, "test")


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(str(run_dir))]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_run_that_is_cut_goes_on_to_the_bit(
    data: str, tmp_path: Path, zero_stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the model are rounded, those of the checkpoint are not."""
    types: list[set[torch.dtype]] = []
    step = Engine.step

    def noted(engine: Engine, *given: Any) -> Any:
        types.append({parameter.dtype for parameter in engine.named.values()})
        return step(engine, *given)

    monkeypatch.setattr(Engine, "step", noted)
    start(spec_of(data, tmp_path / "straight", zero_stage=zero_stage))
    assert types == [{torch.float32}] * 2 + [{torch.bfloat16}] * 6
    start(spec_of(data, tmp_path / "cut", zero_stage=zero_stage), stop_after=5)
    start(spec_of(data, tmp_path / "cut", zero_stage=zero_stage), resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    straight, cut = (find_checkpoint(str(tmp_path / name)) for name in ("straight", "cut"))
    for one, other in ((straight.parameters, cut.parameters), (straight.moments, cut.moments)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in straight.parameters.values())


def test_losses_are_near_those_of_fp32_weights_whatever_shares_out_a_batch(data: str, tmp_path: Path) -> None:
    start(spec_of(data, tmp_path / "wide", weights="fp32"))
    for name, train in {"narrow": {}, "pieces": {"micro_batch_size": 1, "zero_stage": 3}}.items():
        start(spec_of(data, tmp_path / name, **train))
        torch.testing.assert_close(losses(tmp_path / name), losses(tmp_path / "wide"), atol=0.01, rtol=0)


def test_a_weight_takes_two_bytes_and_what_steps_it_as_much_as_before(data: str) -> None:
    spec = spec_of(data, Path("run"))
    shape = family_of(spec.model.family).shape(spec.model, Facts(300), "bf16")
    weights = weights_of(shape, FULL, spec.train.weights)
    assert weights.trained_bytes == 2 * weights.trained
    assert held(weights, 1, 4).static == {
        "weights": weights.bytes,
        "masters": -(-weights.trained // 4) * MASTER,
        "moments": -(-weights.trained // 4) * MOMENTS,
    }
    assert held(weights, 1, 4).step["gradients"] == GRADIENT * weights.trained
    assert weights_of(shape, FULL[:3], spec.train.weights).trained_bytes == 4 * sum(weights.groups[name] for name in FULL[:3])


@pytest.mark.parametrize(
    ("train", "told"),
    [({"zero_stage": 0}, "weights bf16 needs zero_stage 1, 2 or 3"), ({"precision": "fp32"}, "needs precision bf16")],
)
def test_what_would_lose_updates_is_refused(data: str, train: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        spec_of(data, Path("run"), **train)
