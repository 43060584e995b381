"""What a whole training step of DIN costs by the rows of its table of items; time and memory of each of two CPU workers.

The same number of random ids are looked up in a step, whatever the number of rows. Beside sharded tables, in fewer rows, the same
model with a dense table, which every worker holds and AdamW steps whole.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks.report import machine, machine_line, markdown
from benchmarks.tables import MIB, WARM_UP, of_workers, status, timed, together
from ctrsink import strict_json
from ctrsink.tables.shares import bytes_needed


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    if args.worker is not None:
        print(json.dumps(_worker(args)), flush=True)
        return 0
    report = run(args)
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.tables_training", description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[100_000, 1_000_000, 10_000_000], help="of sharded tables")
    parser.add_argument("--dense-rows", nargs="+", type=int, default=[100_000, 1_000_000], help="of dense tables")
    parser.add_argument("--width", type=int, default=32, help="of the table")
    parser.add_argument("--sequences", type=int, default=256, help="of a step, of all workers")
    parser.add_argument("--history", type=int, default=50, help="behaviours of each")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30, help="of each; the median is told")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--kind", choices=("sharded", "dense"), help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every table in processes of its own, so that each has a peak of memory of its own; returns all figures."""
    found, rows = machine(), []
    names = ("width", "sequences", "history", "zero_stage", "steps", "workers")
    settings = {name: getattr(args, name) for name in names}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    for kind, sizes in (("sharded", args.rows), ("dense", args.dense_rows)):
        for count in sizes:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "benchmarks.tables_training", f"--store={folder}/store", *options]
                workers = of_workers([*command, f"--kind={kind}", f"--rows={count}"], args.workers)
            needed = bytes_needed(count, args.width, args.workers) if kind == "sharded" else None
            rows.append({"table": kind, "rows": count, "needed_bytes": needed, **together(workers)})
    by_rows = {row["rows"]: row["step_s"] for row in rows if row["table"] == "sharded"}
    return {"machine": found, "settings": settings, "training": rows, "ratio": by_rows[max(by_rows)] / by_rows[min(by_rows)]}


def _worker(args: argparse.Namespace) -> dict[str, Any]:
    rank, world = args.worker, args.workers
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    from ctrsink.runtime.process import prepare_process

    prepare_process("cpu", 1, 1)
    import torch.distributed as dist

    from ctrsink.config import parse_run
    from ctrsink.dist import Topology, barrier
    from ctrsink.families.facts import Facts
    from ctrsink.families.registry import family_of
    from ctrsink.train.engine import Engine

    dist.init_process_group("gloo", init_method=f"file://{args.store}", rank=rank, world_size=world)
    (rows,) = args.rows
    spec = parse_run(_tree(args, rows), "the benchmark")
    stage, topology, facts = spec.stages[0], Topology(rank, world), Facts(vocabulary=2)
    batches = [[_batch(spec, args, 2 * step + half, rank) for half in (0, 1)] for step in range(WARM_UP + args.steps)]
    before = status("VmRSS")

    def make() -> Engine:
        return Engine(family_of("din").build(spec.model, facts, spec.seed).train(), spec, stage, topology, None)

    made_s, engine = timed(make)
    seconds = []
    for of_step in batches:
        barrier(topology)
        seconds.append(timed(lambda own=of_step: engine.step(own, args.sequences, stage, 1.0))[0])
    peak = status("VmHWM") - before
    barrier(topology)  # a worker that leaves while another is still in its last exchange ends it now and then
    dist.destroy_process_group()
    return {
        "step_s": statistics.median(seconds[WARM_UP:]),
        "longest_s": max(seconds[WARM_UP:]),
        "peak_bytes": peak,
        "made_s": made_s,
    }


def _tree(args: argparse.Namespace, rows: int) -> dict[str, Any]:
    groups = ["ids", "embedding", "model"]
    return {
        "run_dir": "unused",
        "data": {"uri": "unused", "examples": "per_target", "history": args.history, "targets": 1},
        "model": {
            "family": "din",
            "behaviours": ["item_id", "previous_gap"],
            "target": ["item_id", "hour"],
            "rows": rows,
            "embedding_size": args.width,
            "id_tables": args.kind,
        },
        "stages": [{"name": "one", "trainable": groups, "lr": dict.fromkeys(groups, 0.01), "steps": args.steps}],
        "train": {"batch_size": args.sequences, "zero_stage": args.zero_stage},
        "runtime": {"kind": "ray", "workers": args.workers},
    }


def _batch(spec: Any, args: argparse.Namespace, number: int, rank: int) -> Any:
    """Half of a step's sequences of one rank: random items of all there are, one target behind a history each."""
    from ctrsink.dataset.events import Events
    from ctrsink.dataset.layout import Layout
    from ctrsink.families.facts import Wording
    from ctrsink.families.registry import family_of
    from ctrsink.features.categories import categories
    from ctrsink.features.ragged import Ragged
    from ctrsink.sequences.collate import collate
    from ctrsink.sequences.columns import Sequences
    from ctrsink.sequences.windows import Cuts

    chance = np.random.default_rng((number, rank))
    model, history = spec.model, args.history
    layout = Layout(
        family="din", examples="per_target", history=history, targets=1, signals=("item_id", "previous_gap"),
        buckets=model.buckets, rows=model.rows, target_signals=("item_id", "hour"), target_rows=model.rows,
    )  # fmt: skip
    none, count = Ragged.of([np.empty(0, np.int64)]), args.sequences // (2 * args.workers)
    found = []
    for _ in range(count):
        times = np.cumsum(np.exp(chance.uniform(0, 14, history + 1)).astype(np.int64))
        items, opinions = chance.integers(0, model.rows - 1, history + 1), np.zeros(history + 1, np.int64)
        told = categories((*layout.signals, *layout.target_signals), times, opinions, 0.0) | {"item_id": items}
        events = Events(
            texts=opinions, feedbacks=opinions, timestamps=times, labels=chance.integers(0, 2, history + 1).astype(np.int8),
            known=np.arange(history + 1), tokens=none, numbers=np.empty((history + 1, 0), np.float32),
            target_numbers=np.empty((history + 1, 0), np.float32), categories=told,
        )  # fmt: skip
        cuts = Cuts([events], np.array([1]), np.array([0]), Ragged.of([np.array([history])]))
        found.append(family_of("din").encode(cuts, layout, Wording(none, np.empty(0, np.int64))))
    return collate(Sequences.joined(found), np.arange(count), np.arange(count))


def text(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    header = ("table", "rows", "ms a step", "longest", "MiB needed", "peak, MiB", "s to make")
    scaled = {"step_s": 1e3, "longest_s": 1e3, "needed_bytes": 1 / MIB, "peak_bytes": 1 / MIB, "made_s": 1}
    rows = [
        [row["table"], row["rows"]] + [None if row[name] is None else row[name] * by for name, by in scaled.items()]
        for row in report["training"]
    ]
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report["settings"].items())
    return (
        f"{machine_line(report['machine'])}.\n\n{settings}; memory of each worker, above what it took before.\n\n"
        f"{markdown(header, rows)}\n\n"
        f"A step with the largest sharded table takes {report['ratio']:.2f} times that with the smallest."
    )


if __name__ == "__main__":
    sys.exit(main())
