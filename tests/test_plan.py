"""`ctrsink plan`: what it tells, that its parts add up, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctrsink.cli import main
from ctrsink.config import parse_run
from ctrsink.errors import InputError
from ctrsink.estimate.devices import GPUS
from ctrsink.estimate.table import as_table
from ctrsink.runtime.plan import plan_run
from tests.command_line import call, refused
from tests.runs import prepared_data, run_tree
from tests.test_families_runs import SMALL, tree_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("plan") / "data"))


def plan_of(tree: dict[str, Any], gpu: str | None = "h100-80gb", **more: Any) -> dict[str, Any]:
    return plan_run(parse_run(tree, "test"), gpu, **more)


def test_its_parts_add_up(data: str) -> None:
    found = plan_of(run_tree(data, "run", train={"batch_size": 64}), nodes=2, per_node=4, price=3.0)
    assert [stage["stage"] for stage in found["stages"]] == ["align", "all"]
    for stage in found["stages"]:
        for zero in range(4):
            memory = stage["memory"][f"zero_{zero}"]
            assert memory["total"] == sum(memory["static"].values()) + sum(memory["step"].values())
        totals = [stage["memory"][f"zero_{zero}"]["static"]["moments"] for zero in range(4)]
        assert totals[0] > totals[1] == totals[2] == totals[3]
        micro, step, epoch = stage["micro_batch"], stage["step"], stage["epoch"]
        assert micro["peak"] == stage["memory"]["zero_2"]["total"] + micro["activations"]
        assert micro["peak"] < GPUS["h100-80gb"].memory
        assert micro["tokens"] < micro["largest_tokens"]
        assert step["seconds"] == pytest.approx(max(step["compute"], step["communication"]) + step["optimiser"])
        assert epoch["cost"] == pytest.approx(8 * 3.0 * epoch["hours"])
        assert epoch["impressions_per_s"] * step["seconds"] == pytest.approx(step["impressions"])
        assert step["flops"] * 8 == pytest.approx(stage["flops_per_impression"] * step["impressions"])
    assert "limited by" in as_table(found)


def test_a_sweep_has_a_row_for_each_number_of_nodes(data: str) -> None:
    found = plan_of(run_tree(data, "run"), sweep=(1, 2, 4, 16))
    rows = found["sweep"]
    assert [row["devices"] for row in rows] == [1, 2, 4, 16]
    assert rows[0]["peak"] > rows[2]["peak"]
    assert "leaves some of 16 workers without work" in rows[3]["error"]
    assert len(as_table(found).splitlines()[-5:]) == 5


def test_auto_fills_the_device_and_no_more(data: str) -> None:
    tree = run_tree(data, "run", train={"batch_size": 4_000_000, "micro_batch_tokens": "auto"})
    for stage in plan_of(tree, gpu="l40s")["stages"]:
        micro = stage["micro_batch"]
        assert micro["tokens"] == micro["largest_tokens"]
        assert 0.6 * GPUS["l40s"].memory < micro["peak"] <= GPUS["l40s"].memory
        assert micro["per_step"] > 1


@pytest.mark.parametrize("name", SMALL)
def test_every_family_is_planned(name: str, data: str) -> None:
    found = plan_of(tree_of(name, data, "run", "per_target"), gpu="l40s")
    assert all(stage["flops_per_impression"] > 0 and stage["micro_batch"]["largest_tokens"] > 0 for stage in found["stages"])


def test_a_model_that_does_not_fit_is_limited_by_memory(data: str) -> None:
    """Seven billion parameters in fp32 with all that Adam needs, on one device; no weight is made for it."""
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 7}
    large |= {"num_attention_heads": 64, "num_key_value_heads": 64}
    found = plan_of(run_tree(data, "run", model={"backbone": {"config": large}}), gpu="a100-80gb")
    stage = found["stages"][1]
    assert 6e9 < stage["parameters"]["trainable"] < 8e9
    assert stage["limited_by"].startswith("memory: the step needs ")
    assert stage["micro_batch"]["largest_tokens"] == 0


def test_without_a_gpu_times_need_a_peak(data: str) -> None:
    unknown = plan_of(run_tree(data, "run"), gpu=None)["stages"][0]
    assert "epoch" not in unknown
    assert unknown["limited_by"].startswith("not known")
    known = plan_of(run_tree(data, "run", runtime={"peak_tflops": 0.1}), gpu=None, utilisation=0.5)["stages"][0]
    assert known["step"]["compute"] == pytest.approx(known["step"]["flops"] / (0.5 * 0.1e12))


@pytest.mark.parametrize("more", [["--resume"], ["--stop-after", "3"]])
def test_a_dry_run_takes_no_other_flag(more: list[str]) -> None:
    told = "--dry-run writes nothing and begins anew: leave out --resume and --stop-after"
    refused(call("train", "--config", "configs/ctr-sink.yaml", "--dry-run", *more), told)


def test_what_is_missing_is_refused_in_one_line(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="prepare the data set there with `ctrsink data prepare`"):
        plan_of(run_tree(str(tmp_path / "none"), "run"))
    with pytest.raises(InputError, match=r"runtime\.device cuda: say which with --gpu"):
        plan_of(run_tree(data, "run", runtime={"device": "cuda"}), gpu=None)
    with pytest.raises(InputError, match="a batch of 8 sequences leaves some of 16 workers without work"):
        plan_of(run_tree(data, "run"), per_node=16)
    for words in (["--sweep", "2,4"], ["--price", "-1"], ["--utilisation", "1.5"], ["--nodes", "0"]):
        with pytest.raises(SystemExit) as ended:
            main(["plan", "--config", "x.yaml", *words])
        assert ended.value.code == 2
    assert "write nodes=1,2,4" in capsys.readouterr().err


def test_the_command_prints_a_table_or_one_object(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_tree(data, str(tmp_path / "run"))))
    command = ["plan", "--config", str(path), "--gpu", "h200", "--sweep", "nodes=1,2"]
    assert main(command) == 0
    assert "zero 2*" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "h200"
    assert not (tmp_path / "run").exists()
