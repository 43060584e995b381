"""How forward and backward through SparseCTR's blocks grow with the history, beside dense attention with the same bias.

Each in a fresh process. `sparse`: as the family computes it. `dense`: the same blocks with torch's SDPA over all that lies before
and the same time bias, in place of the three branches. Memory is what the steps need on top of model and batch. CPU seconds are
those of the process, which other load on the machine changes less. A contestant that would go beyond `--memory-gib` is stopped,
and said to be.
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
from ctrsink import strict_json

ROOT = Path(__file__).resolve().parent.parent
CONTESTANTS = ("sparse", "dense")


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
    parser = argparse.ArgumentParser("python -m benchmarks.sparse_length", description=__doc__)
    parser.add_argument("--history", nargs="+", type=int, default=[128, 512, 2048, 8192], help="behaviours of the sequence")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=1, help="layers (default: %(default)s)")
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
    ours = {row["history"]: row for row in rows if row["contestant"] == "sparse"}
    for row in rows:
        for what, value in (("time", "s_per_step"), ("cpu", "cpu_s_per_step"), ("memory", "peak_gib")):
            own = ours.get(row["history"], {}).get(value)
            row[f"{what}_ratio"] = row[value] / own if row[value] is not None and own else None
    names = ("width", "heads", "blocks", "chunks", "transition", "window", "threads", "memory_gib", "steps")
    return {"machine": found, "settings": {name: getattr(args, name) for name in names}, "growth": rows}


def _in_process(args: argparse.Namespace, contestant: str, history: int) -> dict[str, Any]:
    options = {name: value for name, value in vars(args).items() if name not in ("contestants", "history", "json", "one")}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "benchmarks.sparse_length", "--one", contestant, "--history", str(history), *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{contestant} with {history} behaviours failed, see above")
    return {"contestant": contestant, "history": history} | json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace, contestant: str, history: int) -> dict[str, Any]:
    """Time per step and peak memory of one contestant, in this process."""
    import torch

    from benchmarks.sparse_dense import FullAttention, spec_of, stack_of

    torch.set_num_threads(args.threads)
    spec = spec_of(args.width, args.heads, args.blocks, args.chunks, args.transition, args.window)
    blocks, rows, profiles, seen = stack_of(spec, history)
    if contestant == "dense":
        for block in blocks:
            block.attention = FullAttention(block.attention)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    resource.setrlimit(resource.RLIMIT_DATA, (int(args.memory_gib * GIB), int(args.memory_gib * GIB)))
    before, times, of_cpu = _peak(), [], []
    try:
        for _ in range(1 + args.steps):
            blocks.zero_grad()
            began, cpu_began, out = time.perf_counter(), time.process_time(), rows
            for block in blocks:
                out = block(out, profiles, seen)
            out.square().sum().backward()
            times.append(time.perf_counter() - began)
            of_cpu.append(time.process_time() - cpu_began)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return {"s_per_step": None, "cpu_s_per_step": None, "peak_gib": None}
    peak = (_peak() - before) / GIB
    return {"s_per_step": median(times[1:]), "cpu_s_per_step": median(of_cpu[1:]), "peak_gib": peak}


def _peak() -> int:
    """Most bytes that the process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def text(report: dict[str, Any]) -> str:
    """The report as Markdown; a dash where a contestant was stopped."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    keys = ["history", "contestant", "s_per_step", "cpu_s_per_step", "peak_gib", "time_ratio", "cpu_ratio", "memory_ratio"]
    header = ["behaviours", "contestant", "s/step", "CPU s/step", "peak GiB", "time / sparse", "CPU / sparse", "memory / sparse"]
    table = markdown(header, [[row[key] for key in keys] for row in report["growth"]])
    stopped = f"A dash: it would have gone beyond {report['settings']['memory_gib']:g} GiB."
    return f"{machine_line(report['machine'])}\n\n{settings}\n\n{table}\n\n{stopped}"


if __name__ == "__main__":
    sys.exit(main())
