"""`ctrsink evaluate` where a run trained: in its precision, on its device, on workers of a Ray cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ctrsink.config import parse_run
from ctrsink.errors import InputError
from ctrsink.runtime.evaluate import evaluate
from ctrsink.runtime.start import start
from tests.rank_processes import run_ranks
from tests.runs import prepared_data, run_tree
from tests.services.ray_cluster import RayCluster

RANK = """
import json, os, sys
rank, store, given = sys.argv[1:]
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
from ctrsink.runtime.process import prepare_process
prepare_process("cpu", 1, int(rank))
import numpy as np
import torch.distributed as dist
from ctrsink import dist as ours
from ctrsink.config import parse_run
from ctrsink.dist import Topology, from_first, gather_first
from ctrsink.runtime import preflight
from ctrsink.train.measure_together import evaluate_together
dist.init_process_group("gloo", init_method="file://" + store, rank=int(rank), world_size=2)
topology = Topology(int(rank), 2)
ours.PART_ROWS = 3
kind = np.dtype([("user", np.int64), ("label", np.int8), ("p", np.float64)])
for sizes in ((7, 2), (0, 5), (0, 0), (3, 3)):
    whole = np.zeros(sum(sizes), kind)
    whole["user"], whole["p"] = 2**62 + np.arange(len(whole)), np.arange(len(whole)) / 3
    own = whole[: sizes[0]] if topology.is_first else whole[sizes[0] :]
    found = gather_first(own, topology)
    assert (found is None) == (not topology.is_first), found
    assert found is None or (found.dtype == kind and np.array_equal(found, whole)), found
told = from_first({"é": float("nan"), "third": 1 / 3, "n": 2} if topology.is_first else None, topology)
assert told["é"] != told["é"] and told["third"] == 1 / 3 and isinstance(told["n"], int), told
spec = parse_run(json.loads(given), "test")
print(json.dumps(evaluate_together(spec, topology, preflight.check(spec), None)))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The configuration of a run that has ended, in bfloat16."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = prepared_data(str(folder / "data"))
    tree = run_tree(data, str(folder / "run"), train={"precision": "bf16", "checkpoint_every": 10})
    start(parse_run(tree, "test"))
    return tree


def written(tree: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    folder = Path(tree["run_dir"]) / "evaluation"
    return json.loads((folder / "test.json").read_text()), pq.read_table(folder / "test.parquet")


def close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=tolerance, nan_ok=True), name


def test_with_an_override_a_run_is_measured_as_it_measured_itself(trained: dict[str, Any]) -> None:
    """In bfloat16, to the last bit; without, in fp32, which is another number."""
    own, table = written(trained)
    plain = evaluate(trained["run_dir"], [], ("test",), None)["test"]
    assert plain["logloss"] != own["logloss"]
    again = evaluate(trained["run_dir"], ["runtime.kind=local"], ("test",), None)["test"]
    assert written(trained) == (own, table)
    assert {name: value for name, value in again.items() if value == value} == {
        name: value for name, value in own.items() if name not in ("step", "version") and value is not None
    }


def test_an_earlier_checkpoint_and_a_sample_can_be_asked_for(trained: dict[str, Any]) -> None:
    own, _ = written(trained)
    try:
        found = evaluate(trained["run_dir"], ["evaluate.max_sequences=5"], ("test",), 10)["test"]
        told, table = written(trained)
        assert told["step"] == 10
        assert found["impressions"] == len(table) < own["impressions"]
    finally:
        evaluate(trained["run_dir"], ["runtime.kind=local"], ("test",), None)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("model.sinks.buckets=9", r"is measured as it was trained: model\.sinks\.buckets was \d+, is 9; leave that override out"),
        ("train.precision=fp32", r"train\.precision was bf16, is fp32"),
        ("runtime.workers=2", "local runs one process"),
        ("runtime", "is not of the form section.key=value"),
    ],
)
def test_what_would_measure_another_run_is_refused(trained: dict[str, Any], override: str, why: str) -> None:
    before = written(trained)
    with pytest.raises(InputError, match=why):
        evaluate(trained["run_dir"], [override], ("test",), None)
    assert written(trained) == before


def test_a_checkpoint_that_is_not_there_is_refused(trained: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="has no checkpoint of step 11"):
        evaluate(trained["run_dir"], ["runtime.kind=local"], ("test",), 11)


@pytest.mark.slow
def test_two_ranks_under_zero_3_measure_what_one_does(trained: dict[str, Any], tmp_path: Path, repository: Path) -> None:
    own, table = written(trained)
    tree = {**trained, "train": {**trained["train"], "zero_stage": 3}, "runtime": {"kind": "ray", "workers": 2}}
    tree["evaluate"] = {"splits": ["test"], "batch_size": 3}
    printed = run_ranks(["-c", RANK], 2, [str(tmp_path / "store"), json.dumps(tree)], repository, 240)
    assert printed[0] == printed[1]
    told, again = written(trained)
    close(told, own, 0.02)
    assert told == {"version": told["version"], "step": 20} | printed[0][0]["test"] | {
        name: value for name, value in told.items() if value is None
    }
    assert again.select(["user", "event", "label"]) == table.select(["user", "event", "label"])


@pytest.mark.slow
def test_the_workers_of_a_cluster_measure_a_run(trained: dict[str, Any], ray_cluster: RayCluster, repository: Path) -> None:
    own, table = written(trained)
    verb = [sys.executable, "-m", "ctrsink", "evaluate", "--json", "--run", trained["run_dir"]]
    place = ["runtime.kind=ray", "runtime.workers=2", f"runtime.address={ray_cluster.gcs_address}"]
    environment = os.environ | ray_cluster.env() | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [*verb, *place, "--split", "test"], cwd=repository, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told, again = written(trained)
    found = json.loads(done.stdout.splitlines()[-1])["evaluation"]["test"]
    assert told == {"version": told["version"], "step": 20} | found
    close(told, own, 0.02)
    assert again.select(["user", "event", "label"]) == table.select(["user", "event", "label"])
    assert not (Path(trained["run_dir"]) / "stop-requested").exists()
    assert not (Path(trained["run_dir"]) / "failures").exists()
