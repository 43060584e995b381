"""ZeRO-3 of two real ranks: no process holds the whole model, in a build, a change of stage, a checkpoint or on the way back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from ctrsink.run.listing import folder_of
from ctrsink.train.observe.telemetry import read_metrics
from tests.rank_processes import run_ranks
from tests.runs import prepared_data
from tests.zero3_ranks import BACKBONE, CUTS, STEPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The folder of the runs, and what the ranks printed of each case."""
    folder = tmp_path_factory.mktemp("zero3")
    data = prepared_data(str(folder / "data"))
    torch.manual_seed(3)
    AutoModel.from_config(AutoConfig.for_model("llama", **BACKBONE, vocab_size=300)).save_pretrained(folder / "pretrained")
    arguments = ["2", str(folder / "store"), data, str(folder)]
    first, second = run_ranks(["-m", "tests.zero3_ranks"], 2, arguments, repository, 800)
    assert [line["case"] for line in first] == [line["case"] for line in second]
    return folder, {line["case"]: line for line in first}


@pytest.mark.parametrize("what", ["random", "lora", "pretrained"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sharded_model_has_the_values_of_a_whole_one(ran: tuple[Path, dict[str, Any]], what: str, precision: str) -> None:
    found = ran[1][f"{what} {precision}"]
    assert found["wrong"] == []
    assert found["buffers"]
    assert found["parts"]
    assert found["count"] > 30


def test_a_rank_holds_its_share_and_little_more_while_it_builds(ran: tuple[Path, dict[str, Any]]) -> None:
    found = ran[1]["large"]
    assert found["share"] > 40
    assert found["peak"] <= 1.3 * found["share"] + found["largest"]


def curve(folder: Path) -> list[float]:
    rows = {row["step"]: row["loss"] for row in read_metrics(str(folder))}
    return [rows[step] for step in range(1, STEPS + 1)]


def test_stages_change_as_under_zero_2(ran: tuple[Path, dict[str, Any]]) -> None:
    """Weights and moments of each stage go on in the next."""
    folder, found = ran
    assert found["zero2"]["finished"]
    assert curve(folder / "zero3") == pytest.approx(curve(folder / "zero2"), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "whole"), [("cut", "zero3"), ("gathered", "zero3"), ("native", "zero3"), ("narrow cut", "narrow")]
)
def test_a_run_that_is_cut_goes_on_to_the_bit(ran: tuple[Path, dict[str, Any]], name: str, whole: str) -> None:
    folder, found = ran
    assert curve(folder / name) == curve(folder / whole)
    assert found[name]["evaluation"] == found[whole]["evaluation"]
    assert found[name]["checksum"] == found[whole]["checksum"]


@pytest.mark.parametrize("step", [4, 7, *CUTS, STEPS])
def test_tensors_that_are_written_one_by_one_make_the_same_files(ran: tuple[Path, dict[str, Any]], step: int) -> None:
    for name in ("parameters.safetensors", "moments.safetensors"):
        one_by_one, at_once = (Path(folder_of(str(ran[0] / run), step)) / name for run in ("gathered", "cut"))
        assert one_by_one.read_bytes() == at_once.read_bytes()
