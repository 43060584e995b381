"""What a run survives, and at what price: workers killed at random, workers that come and go, failures one after another.

Every failure is real: `kill -9` of a worker's process, or of a whole Ray node. What a run says that it trained on (see
ctrsink.train.observe.audit) is held against the data set; its losses against those of a run that was left alone, where there is
one. That weights are what they should be shows in the losses alone.
"""

import argparse
import logging
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil

from benchmarks.raw import synthetic_log
from benchmarks.report import machine, machine_line, markdown
from benchmarks.training import prepare_once
from ctrsink import logs, strict_json
from ctrsink.config import RunSpec, load_run
from ctrsink.families.registry import source_of
from ctrsink.run.folder import request_stop
from ctrsink.runtime.process import stay_on_loopback
from ctrsink.stream.order import Order
from ctrsink.train.checkpoint.checkpoint import list_checkpoints
from ctrsink.train.observe.audit import Audit, expected
from ctrsink.train.observe.telemetry import read_metrics
from ctrsink.train.restore import restore_run


@dataclass(frozen=True)
class Row:
    """What became of one run."""

    run: str
    finished: bool
    failures: int
    exact: bool
    """Whether it trained on the multiset of impressions that the data set's order gives."""
    wall_s: float
    goodput: float
    """Time of the steps that counted over the wall clock, evaluation and start included; that of Ray in the first run alone."""
    worlds: list[int]
    """Workers, from group to group."""
    bitwise: bool | None = None
    """Whether every loss is that of the run that was left alone; None where that is not to be expected, or there was none."""
    last_loss_off: float | None = None
    """Relative distance of the last loss from that run's."""


Breaker = Callable[[str, threading.Event], list[float]]
"""Breaks something while a run trains in the folder, until it is told to end; returns when, in seconds since the start."""
WORKER = "ray::RayTrainWorker"
WORKERS = 2
log = logging.getLogger("ctrsink")


def main() -> int:
    """Run the benchmark; returns the exit code: 1 where a run did not end, nothing failed, or anything differed that must not."""
    args = _arguments()
    logs.configure()
    os.environ |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1", "DS_ACCELERATOR": "cpu", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        found = machine()
        rows = args.experiment(args, Path(folder).resolve())
    print(strict_json.dumps({"machine": found, "runs": [asdict(row) for row in rows]}) if args.json else text(found, rows))
    return 0 if all(good(row) for row in rows) else 1


def good(row: Row) -> bool:
    """Whether it ended although something failed, and nothing differs that must not."""
    same = row.bitwise is not False and (row.last_loss_off or 0.0) < 1e-5
    return row.finished and row.failures > 0 and row.exact and same


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.survival", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--events", type=int, default=20_000, help="of the synthetic log (default: %(default)s)")
    common.add_argument("--seed", type=int, default=0, help="of the moments of failure")
    common.add_argument("--work", metavar="DIR", help="where temporary files go (default: the system's place)")
    common.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    kinds = parser.add_subparsers(required=True, metavar="EXPERIMENT")
    kill = kinds.add_parser("kill", parents=[common], help="runs with kill -9 of a random worker at a random moment")
    kill.add_argument("--runs", type=int, default=20)
    kill.add_argument("--steps", type=int, default=300)
    kill.set_defaults(experiment=killed_runs)
    elastic = kinds.add_parser("elastic", parents=[common], help="two workers, then one, then two again")
    elastic.add_argument("--steps", type=int, default=1500)
    elastic.add_argument("--rate", type=float, default=0.0003, help="learning rate (default: %(default)s)")
    elastic.set_defaults(experiment=elastic_run)
    soak = kinds.add_parser("soak", parents=[common], help="a failure every so many seconds; goodput")
    soak.add_argument("--minutes", type=float, default=15.0)
    soak.add_argument("--every", type=float, default=60.0, help="seconds between two failures")
    soak.set_defaults(experiment=soaked_run)
    return parser.parse_args()


def spec_of(args: argparse.Namespace, folder: Path, name: str, *overrides: str) -> RunSpec:
    """A run of two Ray workers on the tiny model, fp32, with dropout, and a stage boundary; the data are prepared once."""
    config = synthetic_log(folder, args.events) if not (folder / "raw").exists() else folder / "run.yaml"
    own = [
        f"run_dir={folder / name}", f"data.uri={folder / 'data'}", "data.examples=per_user", "data.history=10", "data.targets=20",
        "runtime.kind=ray", f"runtime.workers={WORKERS}", "runtime.max_failures=-1", "runtime.collective_timeout_s=60",
        "model.backbone.config.attention_dropout=0.1", "train.batch_size=8", "train.micro_batch_size=4",
        "train.checkpoint_every=20", "train.log_every=1", "evaluate.splits=[valid]", "evaluate.max_sequences=100",
    ]  # fmt: skip
    spec = load_run(str(config), [*own, *overrides])
    prepare_once(spec)
    return spec


def train(spec: RunSpec, breaker: Breaker | None = None) -> dict[str, Any]:
    """Train the run while `breaker` breaks things; what it said of itself, when failures were, and how long it all took."""
    from ctrsink.runtime.ray_train import connect
    from ctrsink.runtime.start import start

    ended, began = threading.Event(), time.monotonic()
    connect(None, WORKERS + 1)
    with ThreadPoolExecutor(1) as pool:  # Ray starts nodes from the main thread alone, so the breaker is there
        training = pool.submit(start, spec)
        training.add_done_callback(lambda _: ended.set())
        try:
            failures = breaker(spec.run_dir, ended) if breaker else []
        except BaseException:
            request_stop(spec.run_dir, "the experiment failed")
            raise
        return training.result() | {"failures": failures, "wall": time.monotonic() - began}


def workers() -> list[psutil.Process]:
    """The processes that train now, below this one."""
    return [p for p in psutil.Process().children(recursive=True) if p.is_running() and WORKER in " ".join(_command(p))]


def kill_one(chance: random.Random, ended: threading.Event) -> bool:
    """Kill a random one of the workers, once there are some; returns whether one was."""
    while not ended.is_set():
        if found := workers():
            with suppress(psutil.NoSuchProcess):
                chance.choice(found).kill()
                return True
        ended.wait(0.02)
    return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def steps_of(run_dir: str) -> int:
    """Steps of the newest checkpoint, finished or not."""
    found = list_checkpoints(run_dir)
    return int(found[0].rpartition("-")[2]) if found else 0


def kill_once(chance: random.Random, steps: int) -> Breaker:
    """Kill a random worker in a random one of the first `steps` steps, or while it starts."""

    def breaker(run_dir: str, ended: threading.Event) -> list[float]:
        began, target = time.monotonic(), chance.randrange(1, steps)
        while steps_of(run_dir) < target - 20 and not ended.wait(0.02):
            pass
        while not workers() and not ended.wait(0.02):
            pass
        ended.wait(chance.random() * 2)
        return [time.monotonic() - began] if kill_one(chance, ended) else []

    return breaker


def killed_runs(args: argparse.Namespace, folder: Path) -> list[Row]:
    """20 runs, each with one kill; beside the run that was left alone."""
    import ray

    stay_on_loopback(None)
    chance = random.Random(args.seed)
    limits = [f"stages=[{_stage('align', args.steps // 3, 'sinks')},{_stage('all', args.steps - args.steps // 3, 'all')}]"]
    alone = spec_of(args, folder, "alone", *limits)
    train(alone)
    rows = []
    for number in range(args.runs):
        spec = spec_of(args, folder, f"killed-{number}", *limits)
        row = row_of(f"kill {number}", spec, train(spec, kill_once(chance, args.steps)))
        rows.append(beside(row, spec, alone, True))
        log.info("%s", rows[-1])
    ray.shutdown()
    return rows


def _stage(name: str, steps: int, over: str, rate: float = 0.003) -> str:
    trained = ["sink", "bias", "head"] + (["backbone"] if over == "all" else [])
    return strict_json.dumps(
        {"name": name, "readout": {"over": over}, "trainable": trained, "lr": dict.fromkeys(trained, rate), "steps": steps}
    )


def row_of(name: str, spec: RunSpec, result: dict[str, Any]) -> Row:
    """What became of a run that has ended."""
    run = restore_run(spec.run_dir)
    source = source_of(run.dataset, "train", run.layout)
    order = Order(source.per_shard, spec.seed, spec.data.shuffle_shards)
    # A resumed run drops the rows behind its checkpoint: what is left is one row per step.
    worlds = [sum(key.startswith("memory_gib/rank") for key in row) for row in read_metrics(spec.run_dir)]
    return Row(
        run=name,
        finished=result["finished"] or result["stopped"] is not None,
        failures=len(result["failures"]),
        exact=Audit(result["impressions"], int(result["checksum"], 16)) == expected(source, order, 0, run.checkpoint.position),
        wall_s=result["wall"],
        goodput=result["seconds"] / result["wall"],
        worlds=[world for world, _ in groupby(worlds)],
    )


def beside(row: Row, spec: RunSpec, alone: RunSpec, bitwise: bool) -> Row:
    """The row of a run, its losses beside those of the run that was left alone."""
    a, b = ([row["loss"] for row in read_metrics(run.run_dir)] for run in (alone, spec))
    off = abs(a[-1] - b[-1]) / abs(a[-1]) if len(a) == len(b) else float("inf")
    return replace(row, bitwise=a == b if bitwise else None, last_loss_off=off)


def elastic_run(args: argparse.Namespace, folder: Path) -> list[Row]:
    """A cluster of two nodes with a core each, beside a head with none; one node is killed and comes back."""
    import ray
    from ray.cluster_utils import Cluster

    stay_on_loopback(None)
    # At a high rate the last bits, in which one worker and two differ, grow into another training within a hundred steps.
    stages = [f"stages=[{_stage('all', args.steps, 'all', args.rate)}]"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 10**8})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2)]
    ray.init(address=cluster.address)
    alone = spec_of(args, folder, "alone", *stages, "model.backbone.config.attention_dropout=0")
    train(alone)
    spec = spec_of(
        args, folder, "elastic", *stages, "model.backbone.config.attention_dropout=0",
        "runtime.workers={min: 1, max: 2}", "runtime.resize_every_s=5",
    )  # fmt: skip

    def come_and_go(run_dir: str, ended: threading.Event) -> list[float]:
        began, when = time.monotonic(), []
        while steps_of(run_dir) < args.steps // 4 and not ended.wait(0.1):
            pass
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        when.append(time.monotonic() - began)
        gone = steps_of(run_dir)
        while steps_of(run_dir) < gone + args.steps // 4 and not ended.wait(0.1):
            pass
        nodes.append(cluster.add_node(wait=False, num_cpus=1, object_store_memory=10**8))
        return when

    # One worker and two add up in other orders, so that the last bits differ.
    row = beside(row_of("2 -> 1 -> 2", spec, train(spec, come_and_go)), spec, alone, False)
    ray.shutdown()
    cluster.shutdown()
    return [row]


def soaked_run(args: argparse.Namespace, folder: Path) -> list[Row]:
    """A run of `minutes` from its first steps on, with a worker killed in the middle of every `every` seconds.

    What it trained on is held against the data set. The goodput counts starting Ray and stopping, too.
    """
    import ray

    stay_on_loopback(None)
    chance = random.Random(args.seed)
    spec = spec_of(args, folder, "soak", f"stages=[{_stage('all', 10**6, 'all')}]")

    def keep_killing(run_dir: str, ended: threading.Event) -> list[float]:
        while not steps_of(run_dir) and not ended.wait(0.1):
            pass
        began, when = time.monotonic(), []
        for number in range(round(60 * args.minutes / args.every)):
            ended.wait(max(0.0, began + (number + 0.5) * args.every - time.monotonic()))
            if kill_one(chance, ended):
                when.append(time.monotonic() - began)
        ended.wait(max(0.0, began + 60 * args.minutes - time.monotonic()))
        request_stop(run_dir, "the soak is over")
        return when

    row = row_of(f"soak {args.minutes:g} min", spec, train(spec, keep_killing))
    ray.shutdown()
    return [row]


def text(found: dict[str, Any], rows: list[Row]) -> str:
    """The report as Markdown."""
    header = ["run", "ended", "failures", "multiset exact", "workers", "losses bitwise", "last loss off by", "wall s", "goodput"]
    keys = ["run", "finished", "failures", "exact", "worlds", "bitwise", "last_loss_off", "wall_s", "goodput"]
    cells = [[_cell(getattr(row, key)) for key in keys] for row in rows]
    return f"{machine_line(found)}\n\n{markdown(header, cells)}"


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
