"""Two processes with gloo: every rank runs every module equally often, whatever its batch holds, or ZeRO-3 would hang."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ctrsink.config import parse_run
from ctrsink.config.load import merge
from ctrsink.dataset.manifest import read_manifest
from ctrsink.families.decoder.build import build_model
from ctrsink.run.folder import claim, identities
from ctrsink.runtime.start import start
from ctrsink.sequences.batch import Batch
from ctrsink.train.observe.telemetry import read_metrics
from tests.builders import layout_of, random_batch
from tests.rank_processes import run_ranks
from tests.runs import run_tree
from tests.test_forms import make_requests

RANK = """
import json, os, sys
rank, store, uneven, *runs = sys.argv[1:]
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
from ctrsink.runtime.process import prepare_process
prepare_process("cpu", 1, int(rank))
import torch.distributed as dist
from ctrsink.config import parse_run
from ctrsink.dist import Topology
from ctrsink.families.decoder.build import build_model
from ctrsink.train.engine import Engine
from ctrsink.runtime import preflight
from ctrsink.train.loop import Trainer
from tests.test_ranks import uneven_batches
dist.init_process_group("gloo", init_method="file://" + store, rank=int(rank), world_size=2)
topology = Topology(int(rank), 2)
spec = parse_run(json.loads(uneven), "test")
stage, batches = spec.stages[0], uneven_batches()
engine = Engine(build_model(spec.model, 97, 1).train(), spec, stage, topology, None)
losses = []
for step in range(3):
    own = batches[(int(rank) + step) % 2]
    losses.append(engine.step([own], sum(b.impressions for b in batches), stage, 1.0).loss)
engine.deepspeed.eval()
for batch in (batches[int(rank)], batches[1 - int(rank)]):
    engine.forward(batch, stage.learns)
temporal = {n: float(v.abs().max()) for n, v in engine.state().moments.items() if n.startswith("temporal")}
engine.destroy()
print(json.dumps({"losses": losses, "temporal": temporal}))
for run in runs:
    spec = parse_run(json.loads(run), "test")
    result = Trainer(spec, topology, preflight.check(spec)).run()
    print(json.dumps({name: result[name] for name in ("steps", "finished", "impressions")}))
dist.destroy_process_group()
"""
pytestmark = pytest.mark.slow  # both share one start of two processes with DeepSpeed, about half a minute
WITHOUT_DROPOUT = {"temporal": True, "backbone": {"config": {"attention_dropout": 0.0}}}
REQUESTS: dict[str, Any] = {
    "data": {"examples": "per_request", "targets": 6},
    "train": {"micro_batch_tokens": 200},
    "model": WITHOUT_DROPOUT | {"sinks": {"signals": ["time_gap", "previous_gap"], "embedding_size": 8}},
}


def uneven_batches() -> list[Batch]:
    """One batch without any sink, and one with some."""
    batches = [random_batch(1, layout_of(), (1, 1)), random_batch(2, layout_of(), (5, 4))]
    assert [b.axes["sinks"].total > 0 for b in batches] == [False, True]
    return batches


@dataclass(frozen=True)
class Ran:
    """What both ranks printed, and where their runs lie."""

    lines: list[dict[str, Any]]
    data: str
    folder: Path

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in read_metrics(str(self.folder / name))]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Ran:
    """Two processes: the uneven batches under ZeRO-3, then a run of requests under ZeRO-2 and one under ZeRO-3."""
    folder = tmp_path_factory.mktemp("ranks")
    data = make_requests(folder / "requests")
    one_each = {"zero_stage": 3, "batch_size": 4, "micro_batch_size": 4}
    trees = [run_tree(data, str(folder / "uneven"), model=WITHOUT_DROPOUT, train=one_each)]
    for zero in (2, 3):
        two = {"train": {"zero_stage": zero}, "runtime": {"kind": "ray", "workers": 2}}
        tree = merge(run_tree(data, str(folder / f"zero{zero}")), merge(REQUESTS, two))
        spec = parse_run(tree, "test")
        claim(spec, False, identities(spec, read_manifest(data)))
        trees.append(tree)
    arguments = [str(folder / "store"), *map(json.dumps, trees)]
    printed = run_ranks(["-c", RANK], 2, arguments, repository, 240)
    assert printed[0] == printed[1]
    return Ran(printed[0], data, folder)


def test_a_rank_without_any_sink_does_not_hang(ran: Ran) -> None:
    """Under ZeRO-3; and its step is that of both batches together."""
    spec = parse_run(run_tree(ran.data, "unused", model=WITHOUT_DROPOUT), "test")
    model = build_model(spec.model, 97, 1)
    with torch.no_grad():
        expected = sum(float(model(b, spec.stages[0].learns).loss) for b in uneven_batches())
    losses = ran.lines[0]["losses"]
    assert losses[0] == pytest.approx(expected / sum(b.impressions for b in uneven_batches()), abs=1e-5)
    assert len(set(losses)) == 3
    temporal = ran.lines[0]["temporal"]
    assert len(temporal) == 12
    assert all(value > 0 for value in temporal.values())


def test_two_ranks_train_requests_with_a_temporal_bias_as_one_does(ran: Ran) -> None:
    """Under ZeRO-2 and under ZeRO-3, with two micro-batches in a step."""
    expected = start(parse_run(merge(run_tree(ran.data, str(ran.folder / "alone")), REQUESTS), "test"))
    assert expected["evaluation"]["test"]["impressions"] == read_manifest(ran.data).splits["test"].impressions
    assert expected["impressions"] > 20 * 8
    for number, zero in enumerate((2, 3), start=1):
        assert ran.lines[number] == {"steps": 20, "finished": True, "impressions": expected["impressions"]}
        assert ran.losses(f"zero{zero}") == pytest.approx(ran.losses("alone"), abs=1e-4)
