"""What benchmarks by the length of the history share: each contestant and length in a fresh process, a step's time and memory."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import GIB, machine, machine_line, markdown
from ctrsink import strict_json

ROOT = Path(__file__).resolve().parent.parent
_OF_THE_WHOLE = ("contestants", "history", "json", "one")
RATIOS = {"time": "s_per_step", "cpu": "cpu_s_per_step", "memory": "peak_gib"}


def arguments(name: str, doc: str | None, contestants: tuple[str, ...], history: list[int], memory_gib: float) -> Any:
    """The parser of the benchmark `name` with the options that all have."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=doc)
    parser.add_argument("--history", nargs="+", type=int, default=history, help="behaviours of every sequence")
    parser.add_argument("--contestants", nargs="+", choices=contestants, default=list(contestants))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument(
        "--memory-gib", type=float, default=memory_gib, help="most that a process may take (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=5, help="steps after one of warm-up; the median is told")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--one", choices=contestants, help=argparse.SUPPRESS)
    return parser


def main(
    name: str,
    args: argparse.Namespace,
    measure: Callable[[argparse.Namespace, str, int], dict[str, Any]],
    columns: dict[str, str],
    ours: str | None = None,
) -> int:
    """Run the benchmark, or with `--one` a single measurement of it; returns the exit code.

    Args:
        measure: figures of one contestant at one length, in this process.
        columns: headers of the table by the keys of its rows.
        ours: the contestant that the ratios of the others, `time_ratio` and so on, are to.
    """
    if args.one:
        print(json.dumps(measure(args, args.one, args.history[0])))
        return 0
    found = machine()
    rows = [_in_process(name, args, contestant, history) for history in args.history for contestant in args.contestants]
    if ours is not None:
        bases = {row["history"]: row for row in rows if row["contestant"] == ours}
        for row in rows:
            for what, value in RATIOS.items():
                base = bases.get(row["history"], {}).get(value)
                row[f"{what}_ratio"] = row[value] / base if row[value] is not None and base else None
    settings = {key: value for key, value in vars(args).items() if key not in _OF_THE_WHOLE}
    report = {"machine": found, "settings": settings, "growth": rows}
    print(strict_json.dumps(report) if args.json else _text(report, columns))
    return 0


def _in_process(name: str, args: argparse.Namespace, contestant: str, history: int) -> dict[str, Any]:
    options = {key: value for key, value in vars(args).items() if key not in _OF_THE_WHOLE and value is not None}
    words = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", f"benchmarks.{name}", "--one", contestant, "--history", str(history), *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{contestant} with {history} behaviours failed, see above")
    return {"contestant": contestant, "history": history} | json.loads(done.stdout.splitlines()[-1])


def measured(step: Callable[[], object], steps: int, memory_gib: float, device: str = "cpu") -> dict[str, float | None]:
    """Medians over `steps` after one of warm-up, and the peak of memory beyond what is held now; None where memory is short."""
    _limit(device, memory_gib)
    before, times, of_cpu = _peak(device), [], []
    try:
        for _ in range(1 + steps):
            began, cpu_began = time.perf_counter(), time.process_time()
            step()
            times.append(time.perf_counter() - began)
            of_cpu.append(time.process_time() - cpu_began)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return dict.fromkeys(RATIOS.values())
    peak = (_peak(device) - before) / GIB
    return dict(zip(RATIOS.values(), (median(times[1:]), median(of_cpu[1:]), peak), strict=True))


def _limit(device: str, gib: float) -> None:
    """Let an allocation beyond it fail: the machine is not driven into swapping."""
    import torch

    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / torch.cuda.mem_get_info()[1]))
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * GIB), int(gib * GIB)))


def _peak(device: str) -> int:
    """Most bytes held so far: of the process on a CPU, of its tensors on a GPU."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _text(report: dict[str, Any], columns: dict[str, str]) -> str:
    """The report as Markdown; a dash where a contestant was stopped."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items() if value is not None)
    table = markdown(list(columns.values()), [[row[key] for key in columns] for row in report["growth"]])
    stopped = f"A dash: it would have gone beyond {report['settings']['memory_gib']:g} GiB."
    return f"{machine_line(report['machine'])}\n\n{settings}\n\n{table}\n\n{stopped}"
