"""How a training step's time and memory grow with the history: ours beside the bias as a dense mask, each in a fresh process.

Memory is what the steps need on top of the built model. A contestant that would go beyond `--memory-gib` is stopped, and said
to be.
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
from benchmarks.shapes import SHAPES, VOCABULARY, random_batch, random_spec, shape_of, trained_groups
from ctrsink import strict_json

ROOT = Path(__file__).resolve().parent.parent
CONTESTANTS = ("ours", "dense")


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
    parser = argparse.ArgumentParser("python -m benchmarks.history_growth", description=__doc__)
    parser.add_argument("--history", nargs="+", type=int, default=[10, 50, 200, 1000], help="behaviours of every sequence")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--bias-layers", type=float, default=0.5, help="share of the layers with the bias (default: %(default)s)")
    parser.add_argument("--event-tokens", type=int, default=9, help="of a behaviour, its sink not counted")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences of a step")
    parser.add_argument("--attention", default="sdpa", help="backend of ours (default: %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--memory-gib", type=float, default=8.0, help="most that a process may take (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps after one of warm-up; the median is told")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everybody in processes of their own and return all figures."""
    found = machine()
    rows = [_in_process(args, contestant, history) for history in args.history for contestant in args.contestants]
    names = ("shape", "layers", "bias_layers", "event_tokens", "batch_size", "attention", "precision", "device", "threads")
    return {
        "machine": found,
        "settings": {name: getattr(args, name) for name in (*names, "memory_gib", "steps")},
        "growth": rows,
    }


def _in_process(args: argparse.Namespace, contestant: str, history: int) -> dict[str, Any]:
    options = {name: value for name, value in vars(args).items() if name not in ("contestants", "history", "json", "one")}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    command = [sys.executable, "-m", "benchmarks.history_growth", "--one", contestant, "--history", str(history), *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{contestant} with {history} behaviours failed, see above")
    return {"contestant": contestant, "history": history} | json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace, contestant: str, history: int) -> dict[str, Any]:
    """Time per step and peak memory of one contestant, in this process."""
    import torch

    from benchmarks.dense import DenseModel
    from benchmarks.training import Trainee
    from ctrsink.config.stages import Objective
    from ctrsink.families.decoder.build import build_model
    from ctrsink.families.parameters import set_trainable

    torch.set_num_threads(args.threads)
    spec = random_spec(shape_of(args.shape, args.layers), True, args.bias_layers, args.attention)
    model = build_model(spec, VOCABULARY, 0, args.precision)
    set_trainable(model, trained_groups(spec))
    trainee = Trainee(DenseModel(model) if contestant == "dense" else model, Objective(), args.device)
    batch = random_batch(args.batch_size, history, args.event_tokens, True)
    batch = batch.to(args.device)
    _limit(args.device, args.memory_gib)
    before, times = _peak(args.device), []
    try:
        for _ in range(1 + args.steps):
            began = time.perf_counter()
            trainee.step([batch])
            times.append(time.perf_counter() - began)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return {"positions": batch.axes["positions"].longest, "s_per_step": None, "peak_gib": None}
    peak = (_peak(args.device) - before) / GIB
    return {"positions": batch.axes["positions"].longest, "s_per_step": median(times[1:]), "peak_gib": peak}


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


def text(report: dict[str, Any]) -> str:
    """The report as Markdown; a dash where a contestant was stopped."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items() if value is not None)
    keys = ["history", "positions", "contestant", "s_per_step", "peak_gib"]
    header = ["behaviours", "positions", "contestant", "s/step", "peak GiB"]
    table = markdown(header, [[row[key] for key in keys] for row in report["growth"]])
    stopped = f"A dash: it would have gone beyond {report['settings']['memory_gib']:g} GiB."
    return f"{machine_line(report['machine'])}\n\n{settings}\n\n{table}\n\n{stopped}"


if __name__ == "__main__":
    sys.exit(main())
