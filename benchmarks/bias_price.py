"""What sinks and their bias cost: a training step without sinks, with sinks, with the bias, and with the bias as a dense mask.

LoRA on a random decoder. All contestants get sequences of the same behaviours and alternate step by step.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.dense import DenseModel
from benchmarks.report import machine, machine_line, markdown
from benchmarks.shapes import SHAPES, VOCABULARY, random_batch, random_spec, shape_of, trained_groups
from benchmarks.training import Trainee
from ctrsink import strict_json
from ctrsink.config.stages import Objective
from ctrsink.families.decoder.build import build_model
from ctrsink.families.decoder.model import CTRModel
from ctrsink.families.parameters import set_trainable
from ctrsink.sequences.batch import Batch

Wrap = Callable[[CTRModel], nn.Module]
# Whether it has sinks, whether it has the bias, and what becomes of the model.
CONTESTANTS: dict[str, tuple[bool, bool, Wrap]] = {
    "no sinks": (False, False, lambda model: model),
    "sinks": (True, False, lambda model: model),
    "sinks and bias": (True, True, lambda model: model),
    "sinks and dense bias": (True, True, DenseModel),
}
BASE = "sinks"


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    report = run(args)
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.bias_price", description=__doc__)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["tiny", "smollm2"])
    parser.add_argument("--layers", type=int, help="of every shape, instead of its own number")
    parser.add_argument("--bias-layers", type=float, default=0.5, help="share of the layers with the bias (default: %(default)s)")
    parser.add_argument("--history", type=int, default=50, help="behaviours of every sequence")
    parser.add_argument("--event-tokens", type=int, default=9, help="of a behaviour, its sink not counted")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a step")
    parser.add_argument("--attention", default="sdpa", help="backend of ours (default: %(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=11, help="steps of each contestant; the median is told")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every shape and return all figures."""
    found = machine() | ({"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {})
    torch.set_num_threads(args.threads)
    names = ("layers", "bias_layers", "history", "event_tokens", "batch_size", "attention", "precision", "device", "threads")
    return {
        "machine": found,
        "settings": {name: getattr(args, name) for name in (*names, "warmup", "steps")},
        "steps": [row for shape in args.shape for row in measure(args, shape)],
    }


def measure(args: argparse.Namespace, shape: str) -> list[dict[str, Any]]:
    """All contestants with one shape."""
    batches = {on: random_batch(args.batch_size, args.history, args.event_tokens, on) for on in (False, True)}
    trainees: dict[str, tuple[Trainee, Batch]] = {}
    for name, (sinks, bias, wrap) in CONTESTANTS.items():
        spec = random_spec(shape_of(shape, args.layers), sinks, args.bias_layers if bias else 0.0, args.attention)
        model = build_model(spec, VOCABULARY, 0, args.precision)
        set_trainable(model, trained_groups(spec))
        trainees[name] = Trainee(wrap(model), Objective(), args.device), batches[sinks].to(args.device)
    times: dict[str, list[float]] = {name: [] for name in trainees}
    for number in range(args.warmup + args.steps):
        for name, (trainee, batch) in trainees.items():
            began = time.perf_counter()
            trainee.step([batch])
            if number >= args.warmup:
                times[name].append(time.perf_counter() - began)
    base = median(times[BASE])
    return [
        {
            "shape": shape,
            "contestant": name,
            "positions": trainees[name][1].axes["positions"].longest,
            "s_per_step": median(taken),
            "fastest": min(taken),
            "slowest": max(taken),
            "ratio": median(taken) / base,
        }
        for name, taken in times.items()
    ]


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items() if value is not None)
    header = ["shape", "contestant", "positions", "s/step", "fastest", "slowest", f"/ {BASE}"]
    keys = ["shape", "contestant", "positions", "s_per_step", "fastest", "slowest", "ratio"]
    return f"{machine_line(report['machine'])}\n\n{settings}\n\n" + markdown(
        header, [[row[key] for key in keys] for row in report["steps"]]
    )


if __name__ == "__main__":
    sys.exit(main())
