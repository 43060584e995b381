"""Sharded tables on several ranks: two train as one does, others go on with what two began, one that fails fails for all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ctrsink.runtime.start import start
from ctrsink.train.checkpoint.checkpoint import folder_of, list_checkpoints
from ctrsink.train.observe.telemetry import read_metrics
from tests.rank_processes import run_ranks
from tests.runs import prepared_data
from tests.services.ray_cluster import RayCluster
from tests.sharded_ranks import CUT, STEPS, ZERO, tree
from tests.test_sharded import NAMES, alter, checkpoint, spec_of

pytestmark = pytest.mark.slow  # two starts of processes with DeepSpeed, and a cluster

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("sharded") / "data"))


def start_ranks(world: int, data: str, folder: Path) -> list[list[dict[str, Any]]]:
    """What each of so many ranks printed of each of its runs."""
    arguments = [str(world), str(folder / f"store-{world}"), data, str(folder)]
    return run_ranks(["-m", "tests.sharded_ranks"], world, arguments, REPOSITORY, 300)


def cut_back(run: Path, target: Path, step: int = CUT) -> Path:
    """A copy of a run as it was at an earlier step."""
    shutil.copytree(run, target)
    for folder in list_checkpoints(str(target)):
        if folder > folder_of(str(target), step):
            shutil.rmtree(folder)
    return target


class Ran:
    """Two ranks trained `two`, three went on with `three` from step CUT on; `one` was trained by this process."""

    def __init__(self, data: str, folder: Path) -> None:
        self.data, self.two, self.three, self.one = data, folder / "two", folder / "three", folder / "one"
        for path in (self.two, self.three):
            path.mkdir()
        self.printed = {2: start_ranks(2, data, self.two)}
        for zero in ZERO:
            cut_back(self.two / f"zero{zero}", self.three / f"zero{zero}")
        damaged = cut_back(self.two / "zero2", self.three / "damaged", STEPS)
        files = sorted((Path(folder_of(str(damaged), STEPS)) / "tables" / NAMES[0]).iterdir())
        assert len(files) == 2
        alter(files[1])  # the first of three ranks has no row in it
        self.printed[3] = start_ranks(3, data, self.three)
        start(spec_of(data, self.one))


@pytest.fixture(scope="module")
def ran(data: str, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(data, tmp_path_factory.mktemp("ranks"))


def assert_alike(run: Path, other: Path) -> None:
    """Losses, norms of gradients, validations, tables and weights are those of the other run, but for the order of sums."""
    for key in ("loss", "grad_norm", "valid/logloss"):
        a, b = ([row[key] for row in read_metrics(str(path)) if key in row] for path in (run, other))
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
    a, b = checkpoint(run), checkpoint(other)
    assert a.trained == b.trained
    for name in NAMES:
        torch.testing.assert_close(a.tables[name].values, b.tables[name].values, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.tables[name].squares, b.tables[name].squares, rtol=1e-2, atol=1e-8)
    for name, value in a.parameters.items():
        torch.testing.assert_close(value, b.parameters[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*(f"zero{zero}" for zero in ZERO), "auto", "full"])
def test_two_ranks_train_as_one_does(ran: Ran, name: str) -> None:
    assert_alike(ran.two / name, ran.one)
    for rank in ran.printed[2]:
        (line,) = [line for line in rank if line["name"] == name]
        assert (line["steps"], line["finished"]) == (STEPS, True)
    a, b = (json.loads((path / "evaluation/test.json").read_text()) for path in (ran.two / name, ran.one))
    assert a["auc"] == pytest.approx(b["auc"], abs=1e-3)


@pytest.mark.parametrize("zero", ZERO)
def test_a_checkpoint_of_two_ranks_is_taken_up_by_one_and_by_three(ran: Ran, zero: int, tmp_path: Path) -> None:
    run = cut_back(ran.two / f"zero{zero}", tmp_path / "run")
    start(spec_of(ran.data, run, train={"zero_stage": zero}), resume=True)
    assert_alike(run, ran.one)
    assert_alike(ran.three / f"zero{zero}", ran.one)


def test_where_one_rank_cannot_write_there_is_no_checkpoint_and_the_last_is_tried_again(ran: Ran) -> None:
    (warned,) = [line["warned"] for line in ran.printed[2][0] if line["name"] == "full"]
    lost = [message for message in warned if "was not saved, training goes on" in message]
    assert ["step 4" in lost[0], "step 8" in lost[1], len(lost)] == [True, True, 2]
    assert "rank 1 could not save its part of the checkpoint" in lost[0]
    assert [Path(folder).name for folder in list_checkpoints(str(ran.two / "full"))] == [f"step-{STEPS:08d}"]


def test_a_table_that_one_of_several_ranks_finds_damaged_makes_all_take_the_checkpoint_before(ran: Ran) -> None:
    assert_alike(ran.three / "damaged", ran.one)
    (warned,) = [line["warned"] for line in ran.printed[3][0] if line["name"] == "damaged"]
    assert any("does not match its hash" in message and "looking for one before it" in message for message in warned)


def test_the_benchmark_tells_steps_and_memory(repository: Path) -> None:
    sizes = ["--rows", "200", "2000", "--dense-rows", "200", "--sequences", "8", "--history", "3", "--steps", "2"]
    command = [sys.executable, "-m", "benchmarks.tables_training", "--json", *sizes]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [(row["table"], row["rows"]) for row in report["training"]] == [("sharded", 200), ("sharded", 2000), ("dense", 200)]
    assert all(row[name] > 0 for row in report["training"] for name in ("step_s", "peak_bytes", "made_s"))
    assert report["ratio"] > 0


def test_workers_of_ray_train_as_one_process_does(data: str, tmp_path: Path, ray_cluster: RayCluster) -> None:
    several = {"kind": "ray", "workers": 2, "address": ray_cluster.gcs_address}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree(data, str(tmp_path / "run"), runtime=several)))
    command = [sys.executable, "-m", "ctrsink", "train", "--config", str(tmp_path / "run.yaml"), "--json"]
    environment = os.environ | ray_cluster.env() | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    start(spec_of(data, tmp_path / "one"))
    assert_alike(tmp_path / "run", tmp_path / "one")
    files = (Path(folder_of(str(tmp_path / "run"), STEPS)) / "tables").rglob("*.safetensors")
    assert len(list(files)) == 4
