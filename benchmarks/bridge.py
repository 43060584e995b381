"""A training step of a small decoder that reads long histories by chunks of sinks, beside dense CTR-Sink and DIN at each length.

Each in a fresh process: forward, backward and AdamW, everything trained. `bridge`: bare sinks, `model.sparse`. `ctr-sink, bare`:
the same sequences, all sinks seen. `ctr-sink`: behaviours with their texts. Both with the same backend and no inter-sink bias.
`din`: the same behaviours without text. Memory is what the steps need on top of model and batch. CPU seconds are those of the
process, which other load on the machine changes less. A contestant that would go beyond `--memory-gib` is stopped, and said so.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import GIB, machine, machine_line, markdown
from benchmarks.shapes import SHAPES
from ctrsink import strict_json

ROOT = Path(__file__).resolve().parent.parent
CONTESTANTS = ("bridge", "ctr-sink, bare", "ctr-sink", "din")
_OURS = "bridge"


def main() -> int:
    """Run the benchmark, or with `--one` a single measurement of it; returns the exit code."""
    args = _arguments()
    if args.one:
        print(json.dumps(measure(args, args.one, args.history[0])))
        return 0
    report = run(args)
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.bridge", description=__doc__)
    parser.add_argument("--history", nargs="+", type=int, default=[50, 200, 1000, 4000], help="behaviours of every sequence")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument(
        "--attention", choices=["blocks", "sdpa"], default="blocks", help="of the decoders (default: %(default)s)"
    )
    parser.add_argument("--event-tokens", type=int, default=9, help="of a behaviour, its sink not counted (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences of a step (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--transition", type=int, default=2)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--memory-gib", type=float, default=12.0, help="most that a process may take (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps after one of warm-up; the median is told")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everybody in processes of their own and return all figures."""
    found = machine()
    rows = [_in_process(args, contestant, history) for history in args.history for contestant in args.contestants]
    ours = {row["history"]: row for row in rows if row["contestant"] == _OURS}
    for row in rows:
        for what, value in (("time", "s_per_step"), ("cpu", "cpu_s_per_step"), ("memory", "peak_gib")):
            own = ours.get(row["history"], {}).get(value)
            row[f"{what}_ratio"] = row[value] / own if row[value] is not None and own else None
    left_out = ("history", "contestants", "json", "one")
    return {"machine": found, "settings": {k: v for k, v in vars(args).items() if k not in left_out}, "growth": rows}


def _in_process(args: argparse.Namespace, contestant: str, history: int) -> dict[str, Any]:
    options = {name: value for name, value in vars(args).items() if name not in ("contestants", "history", "json", "one")}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "benchmarks.bridge", "--one", contestant, "--history", str(history), *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{contestant} with {history} behaviours failed, see above")
    return {"contestant": contestant, "history": history} | json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace, name: str, history: int) -> dict[str, Any]:
    """Time per step and peak memory of one contestant, in this process."""
    import torch

    from benchmarks.bridge_contestants import FACTS, batch_of, contestant
    from benchmarks.training import Trainee
    from ctrsink.config.stages import Objective
    from ctrsink.families.parameters import set_trainable
    from ctrsink.families.registry import family_of

    torch.set_num_threads(args.threads)
    sparse = {"chunks": args.chunks, "transition": args.transition, "window": args.window}
    found = contestant(name, history, args.shape, args.attention, sparse)
    model = family_of(found.spec.family).build(found.spec, FACTS, 0)
    set_trainable(model, found.groups)
    batch, trainee = batch_of(found, args.batch_size, args.event_tokens), Trainee(model, Objective())
    flops = model.flop_count(Objective())(batch).total
    resource.setrlimit(resource.RLIMIT_DATA, (int(args.memory_gib * GIB), int(args.memory_gib * GIB)))
    told: dict[str, Any] = {
        "rows": batch.tokens,
        "gflops": flops / 1e9,
        "s_per_step": None,
        "cpu_s_per_step": None,
        "peak_gib": None,
    }
    before, times, of_cpu = _peak(), [], []
    try:
        for _ in range(1 + args.steps):
            began, cpu_began = time.perf_counter(), time.process_time()
            trainee.step([batch])
            times.append(time.perf_counter() - began)
            of_cpu.append(time.process_time() - cpu_began)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return told
    peak = (_peak() - before) / GIB
    return told | {"s_per_step": median(times[1:]), "cpu_s_per_step": median(of_cpu[1:]), "peak_gib": peak}


def _peak() -> int:
    """Most bytes that the process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def text(report: dict[str, Any]) -> str:
    """The report as Markdown; a dash where a contestant was stopped."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    columns = {
        "history": "behaviours", "contestant": "contestant", "rows": "rows", "gflops": "GFLOPs/step", "s_per_step": "s/step",
        "cpu_s_per_step": "CPU s/step", "peak_gib": "peak GiB", "time_ratio": "time / bridge", "cpu_ratio": "CPU / bridge",
        "memory_ratio": "memory / bridge",
    }  # fmt: skip
    table = markdown(list(columns.values()), [[row[key] for key in columns] for row in report["growth"]])
    stopped = f"A dash: it would have gone beyond {report['settings']['memory_gib']:g} GiB."
    return f"{machine_line(report['machine'])}\n\n{settings}\n\n{table}\n\n{stopped}"


if __name__ == "__main__":
    sys.exit(main())
