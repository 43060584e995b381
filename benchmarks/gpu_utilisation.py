"""Model FLOPs utilisation of LoRA training of Llama-shaped random models: our attention backends beside plain flash attention.

Contestants alternate step by step. The FLOPs are those that the model needs (see `ctrsink.families.decoder.cost`), over the
device's dense peak; the bias, elementwise work and anything computed twice count as time, not as FLOPs.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.report import machine, machine_line, markdown
from benchmarks.shapes import SHAPES, VOCABULARY, random_batch, random_spec, shape_of, trained_groups
from benchmarks.training import Trainee
from ctrsink import strict_json
from ctrsink.config.stages import Objective
from ctrsink.families.decoder.build import build_model
from ctrsink.families.decoder.model import CTRModel
from ctrsink.families.parameters import set_trainable
from ctrsink.sequences.batch import Batch
from ctrsink.train.observe.hardware import known_peak

PLAIN = "flash, no bias"


def backends() -> list[str]:
    """Our backends that this version's configuration allows."""
    found = []
    for name in ("flex", "sdpa"):
        try:
            random_spec(shape_of("test"), True, 1.0, name)
        except ValidationError:
            continue
        found.append(name)
    return found


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    report = run(args)
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    allowed = [*backends(), PLAIN]
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_utilisation", description=__doc__)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["0.5b", "1.5b"])
    parser.add_argument("--contestants", nargs="+", choices=allowed, default=allowed)
    parser.add_argument("--bias-layers", type=float, default=0.5, help="share of the layers with the bias (default: %(default)s)")
    parser.add_argument("--history", type=int, default=200, help="behaviours of every sequence")
    parser.add_argument("--event-tokens", type=int, default=9, help="of a behaviour, its sink not counted")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a step")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=21, help="steps of each contestant; the median is told")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every shape and return all figures."""
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    known = known_peak(name)
    peak = 1e12 * known if known else measured_peak(args.device)
    names = ("bias_layers", "history", "event_tokens", "batch_size", "warmup", "steps")
    return {
        "machine": machine(),
        "device": name,
        "peak_flops": peak,
        "peak_is": "the data sheet's" if known else "the fastest of large bf16 matrix products here",
        "settings": {key: getattr(args, key) for key in names},
        "steps": [row for shape in args.shape for row in measure(args, shape, peak)],
    }


def measured_peak(device: str) -> float:
    """FLOPs/s of the fastest of some large bf16 matrix products."""
    size = 8192 if device == "cuda" else 512
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(a, a)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def measure(args: argparse.Namespace, shape: str, peak: float) -> list[dict[str, Any]]:
    """All contestants with one shape, on the same batch."""
    batch = random_batch(args.batch_size, args.history, args.event_tokens, True).to(args.device)
    trainees = {name: trainee(args, shape, name) for name in args.contestants if args.device != "cpu" or name != "flex"}
    times: dict[str, list[float]] = {name: [] for name in trainees}
    for number in range(args.warmup + args.steps):
        for name, made in trainees.items():
            # Where the flash kernel could not run, this fails instead of being slow.
            forced = name == PLAIN and args.device == "cuda"
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if forced else nullcontext():
                began = time.perf_counter()
                made.step([batch])
            if number >= args.warmup:
                times[name].append(time.perf_counter() - began)
    base = median(times[PLAIN]) if PLAIN in times else None
    return [_row(shape, name, trainees[name], batch, taken, base, peak) for name, taken in times.items()]


def trainee(args: argparse.Namespace, shape: str, name: str) -> Trainee:
    """A contestant; all have the same sinks, and the plain one no bias."""
    plain = name == PLAIN
    spec = random_spec(shape_of(shape), True, 0.0 if plain else args.bias_layers, "flex" if name == "flex" else "sdpa")
    model = build_model(spec, VOCABULARY, 0, "bf16")
    set_trainable(model, trained_groups(spec))
    return Trainee(model, Objective(), args.device)


def _row(
    shape: str, name: str, made: Trainee, batch: Batch, taken: list[float], base: float | None, peak: float
) -> dict[str, Any]:
    assert isinstance(made.model, CTRModel)
    flops, seconds = made.model.flop_count(Objective())(batch), median(taken)
    return {
        "shape": shape,
        "contestant": name,
        "tokens": batch.tokens,
        "s_per_step": seconds,
        "fastest": min(taken),
        "slowest": max(taken),
        "tokens_per_s": batch.tokens / seconds,
        "matrix_tflops": flops.matrices / 1e12,
        "attention_tflops": flops.attention / 1e12,
        "utilisation": flops.total / seconds / peak,
        "ratio_to_plain": seconds / base if base else None,
    }


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    header = ["shape", "attention", "tokens", "s/step", "fastest", "slowest", "tokens/s", "TFLOP", "MFU", f"/ {PLAIN}"]
    rows = [
        [row[key] for key in ("shape", "contestant", "tokens", "s_per_step", "fastest", "slowest", "tokens_per_s")]
        + [row["matrix_tflops"] + row["attention_tflops"], f"{row['utilisation']:.1%}", row["ratio_to_plain"]]
        for row in report["steps"]
    ]
    peak = f"{report['device']}, {report['peak_flops'] / 1e12:,.3g} TFLOP/s in bf16 ({report['peak_is']})"
    return f"{machine_line(report['machine'])}\n\n{peak}; {settings}\n\n{markdown(header, rows)}"


if __name__ == "__main__":
    sys.exit(main())
