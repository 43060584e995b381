"""Two processes with gloo: every rank runs every module equally often, whatever its batch holds, or ZeRO-3 would hang."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ctrsink.config import parse_run
from ctrsink.data.manifest import read_manifest
from ctrsink.runtime.start import start
from ctrsink.train.rundir import claim, identities
from ctrsink.train.telemetry import read_metrics
from tests.runs import run_tree
from tests.test_forms import make_requests

SETUP = """
import json, os, sys
rank, store, *arguments = sys.argv[1:]
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
from ctrsink.runtime.process import prepare_process
prepare_process("cpu", 1, int(rank))
import torch.distributed as dist
from ctrsink.config import parse_run
from ctrsink.dist import Topology
dist.init_process_group("gloo", init_method="file://" + store, rank=int(rank), world_size=2)
topology = Topology(int(rank), 2)
"""
# The first rank's batch has no sink at all, the second's has some.
UNEVEN = """
from ctrsink.model.build import build_model
from ctrsink.train.engine import Engine
from tests.builders import layout_of, random_batch
spec = parse_run(json.loads(arguments[0]), "test")
stage = spec.stages[0]
model = build_model(spec.model, 97, 1).train()
engine = Engine(model, spec, stage, topology, None)
batches = [random_batch(1, layout_of(), (1, 1)), random_batch(2, layout_of(), (5, 4))]
assert [bool(b.sink_valid.any()) for b in batches] == [False, True]
for step in range(3):
    own = batches[(int(rank) + step) % 2]
    result = engine.step([own], sum(b.impressions for b in batches), stage, 1.0)
    print("loss", f"{result.loss:.6f}")
for batch in (batches[int(rank)], batches[1 - int(rank)]):
    engine.engine.eval()
    engine.forward(batch, stage.readout)
print("moved", all(v.abs().max() > 0 for n, v in engine.state().moments.items() if n.startswith("temporal")))
dist.destroy_process_group()
"""
TRAIN = """
from ctrsink.train.loop import Trainer
result = Trainer(parse_run(json.loads(arguments[0]), "test"), topology, int(arguments[1])).run()
print(result["steps"], result["finished"], result["impressions"])
dist.destroy_process_group()
"""
TEMPORAL: dict[str, Any] = {"model": {"temporal": True, "backbone": {"config": {"attention_dropout": 0.0}}}}


def run_ranks(program: str, store: Path, repository: Path, *arguments: str) -> list[list[str]]:
    """The lines that each of the two ranks printed."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SETUP + program, str(rank), str(store), *arguments],
            cwd=repository, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    found = []
    try:
        for process in ranks:
            out, errors = process.communicate(timeout=150)
            assert process.returncode == 0, errors
            found.append([line for line in out.splitlines() if line.split(" ")[0] in ("loss", "moved") or line[:1].isdigit()])
    finally:
        for process in ranks:
            process.kill()
    return found


def losses(lines: list[str]) -> list[float]:
    return [float(line.split()[1]) for line in lines if line.startswith("loss")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_requests(tmp_path_factory.mktemp("requests"))


def test_a_rank_without_any_sink_does_not_hang(data: str, tmp_path: Path, repository: Path) -> None:
    found = {}
    for zero in (2, 3):
        tree = run_tree(data, str(tmp_path / "run"), train={"zero_stage": zero, "batch_size": 8}, **TEMPORAL)
        first, second = run_ranks(UNEVEN, tmp_path / f"store{zero}", repository, json.dumps(tree))
        assert first == second
        assert len(first) == 4
        assert first[-1] == "moved True"
        found[zero] = losses(first)
    assert found[3] == pytest.approx(found[2], abs=1e-5)
    assert len(set(found[2])) == 3


@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_train_requests_with_a_temporal_bias_as_one_does(
    data: str, tmp_path: Path, repository: Path, zero: int
) -> None:
    signals = {"sinks": {"signals": ["time_gap", "previous_gap"], "embedding_size": 8}}
    changes = {"data": {"examples": "per_request", "targets": 6}, "model": TEMPORAL["model"] | signals}
    alone = parse_run(run_tree(data, str(tmp_path / "alone"), **changes), "test")
    expected = start(alone)
    assert expected["evaluation"]["test"]["impressions"] == read_manifest(data).splits["test"].impressions
    tree = run_tree(data, str(tmp_path / "two"), **changes, train={"zero_stage": zero})
    spec = parse_run(tree, "test")
    claim(spec, False, identities(spec, read_manifest(data)))
    printed = run_ranks(TRAIN, tmp_path / "store", repository, json.dumps(tree), "300")
    assert printed == [[f"20 True {expected['impressions']}"]] * 2
    one, two = ([row["loss"] for row in read_metrics(str(tmp_path / name))] for name in ("alone", "two"))
    assert two == pytest.approx(one, abs=1e-4)
