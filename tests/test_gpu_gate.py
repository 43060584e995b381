"""The gate for GPUs: every way to train gives the losses of a CPU; without a GPU the list is checked, and some of it run."""

import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from ctrsink.config import parse_run
from ctrsink.config.model import DecoderSpec
from ctrsink.config.train import TrainSpec
from ctrsink.runtime.process import prepare_process
from ctrsink.train.observe.telemetry import read_metrics
from tests.gpu_gate import CASES, REFERENCE, STEPS, TOLERANCE, Case
from tests.runs import prepared_data

ON_A_CPU = [
    Case("fp32", 1, "sdpa", checkpointing=True, resume=True, ranks=1),
    Case("bf16", 3, "sdpa", checkpointing=True, resume=False, ranks=2),
    Case("fp32", 2, "sdpa", checkpointing=False, resume=True, ranks=2),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("gate") / "data"))


def losses(case: Case, data: str, folder: Path, device: str, *overrides: str) -> list[float]:
    """Of every step. Processes of their own: one keeps the accelerator that DeepSpeed chose first."""
    folder.mkdir()
    for command in case.commands(data, folder, device):
        done = subprocess.run([*command, *overrides], capture_output=True, text=True)
        stopped = "--stop-after" in command
        assert done.returncode == 0, f"{case}, {'first' if stopped else 'last'} process: {done.stderr}"
    return [row["loss"] for row in read_metrics(str(folder / "run"))]


@pytest.fixture(scope="module")
def expected(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(REFERENCE, data, tmp_path_factory.mktemp("gate") / "reference", "cpu")


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.gpu(case.ranks), id=str(case)) for case in CASES])
def test_losses_on_gpus_are_those_of_the_cpu(case: Case, data: str, expected: list[float], tmp_path: Path) -> None:
    found = losses(case, data, tmp_path / "cuda", "cuda")
    torch.testing.assert_close(found, expected, atol=TOLERANCE[case.precision], rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_a_deterministic_run_gives_the_same_bits_again(attention: Any, data: str, tmp_path: Path) -> None:
    case = Case("bf16", 2, attention, checkpointing=False, resume=False, ranks=1)
    first, second = (losses(case, data, tmp_path / name, "cuda", "runtime.deterministic=true") for name in ("one", "two"))
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_A_CPU, ids=str)
def test_some_of_it_on_the_cpu(case: Case, data: str, expected: list[float], tmp_path: Path) -> None:
    """With algorithms that are deterministic: here all operations of a training have one."""
    assert case in CASES
    found = losses(case, data, tmp_path / "cpu", "cpu", "runtime.deterministic=true")
    assert len(found) == sum(STEPS)
    torch.testing.assert_close(found, expected, atol=TOLERANCE[case.precision], rtol=0)


def test_the_list_has_every_combination_of_what_the_configuration_knows() -> None:
    """A precision, a ZeRO stage or a backend that is added to the configuration must come into the list, or be named here."""

    def known(section: Any, key: str, *elsewhere: str) -> set[Any]:
        return set(get_args(section.model_fields[key].annotation)) - set(elsewhere)

    values = {
        "precision": known(TrainSpec, "precision", "auto"),  # one of the others
        "zero_stage": known(TrainSpec, "zero_stage"),
        "attention": known(DecoderSpec, "attention", "blocks"),  # for CPUs
        "checkpointing": {False, True},
        "resume": {False, True},
        "ranks": {1, 2},
    }
    assert {name: {getattr(case, name) for case in CASES} for name in values} == values
    assert len(set(CASES)) == len(CASES) == 2 * 4 * 2 * 2 * 2 * 2
    assert len({str(case) for case in CASES}) == len(CASES)
    assert REFERENCE in CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_is_a_valid_configuration(case: Case, tmp_path: Path) -> None:
    spec = parse_run(case.tree("data", str(tmp_path / "run")), "the gate")
    assert (spec.runtime.device, spec.runtime.most_workers) == ("cuda", case.ranks)
    assert (spec.train.precision, spec.train.zero_stage) == (case.precision, case.zero_stage)
    assert isinstance(spec.model, DecoderSpec)
    assert (spec.model.attention, spec.model.gradient_checkpointing) == (case.attention, case.checkpointing)
    assert len(case.commands("data", tmp_path)) == 1 + case.resume


def test_deterministic_algorithms_are_asked_for_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        prepare_process("cpu", 1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        prepare_process("cpu", 1)
    assert not torch.are_deterministic_algorithms_enabled()
