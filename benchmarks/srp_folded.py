"""What inference of the family srp costs: a history computed once for all candidates, or once for each, beside DIN on the same.

Random models and requests; all contestants get the same requests and alternate pass by pass.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.report import machine, machine_line, markdown
from ctrsink import strict_json
from ctrsink.config.model.din import DinSpec
from ctrsink.config.model.ids import IdsSpec
from ctrsink.config.model.srp import SrpSpec
from ctrsink.config.stages import Objective
from ctrsink.families.facts import Facts
from ctrsink.families.protocol import CTRModule
from ctrsink.families.registry import family_of
from ctrsink.features.registry import of_kind
from ctrsink.sequences.batch import Axis, Batch, Targets

FEEDBACKS = 5
CLICK = Objective()


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    report = run(args)
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.srp_folded", description=__doc__)
    parser.add_argument("--history", type=int, default=200, help="behaviours of every request")
    parser.add_argument("--candidates", nargs="+", type=int, default=[1, 100], help="of every request")
    parser.add_argument("--requests", type=int, default=8, help="of a pass")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--warmup", type=int, default=1, help="passes before the clock starts")
    parser.add_argument("--passes", type=int, default=7, help="of each contestant; the median is told")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every number of candidates and return all figures."""
    found = machine() | ({"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {})
    torch.set_num_threads(args.threads)
    names = ("history", "requests", "precision", "device", "threads", "warmup", "passes")
    return {
        "machine": found,
        "settings": {name: getattr(args, name) for name in names},
        "passes": [row for candidates in args.candidates for row in measure(args, candidates)],
    }


def measure(args: argparse.Namespace, candidates: int) -> list[dict[str, Any]]:
    """All contestants with so many candidates."""
    facts = Facts(0)
    spec, base = SrpSpec(family="srp", max_history=args.history), DinSpec(family="din")
    ours = _ready(family_of("srp").build(spec, facts, 0, args.precision), args.device)
    folded = random_requests(spec, args.requests, args.history, candidates)
    contestants: dict[str, tuple[CTRModule, Batch]] = {
        "srp, folded": (ours, folded.to(args.device)),
        "srp, unfolded": (ours, unfolded(folded).to(args.device)),
        "din, folded": (_ready(family_of("din").build(base, facts, 0, args.precision), args.device), folded.to(args.device)),
    }
    flops = {name: model.flop_count(CLICK)(batch).total / args.requests for name, (model, batch) in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(args.warmup + args.passes):
        for name, (model, batch) in contestants.items():
            taken = _seconds(lambda model=model, batch=batch: model(batch, CLICK), args.device)
            if number >= args.warmup:
                times[name].append(taken / args.requests)
    seconds = {name: median(taken) for name, taken in times.items()}
    return [
        {
            "contestant": name,
            "candidates": candidates,
            "mflops": flops[name] / 1e6,
            "flops_to_folded": flops[name] / flops["srp, folded"],
            "flops_to_din": flops[name] / flops["din, folded"],
            "ms": 1000 * seconds[name],
            "fastest": 1000 * min(times[name]),
            "slowest": 1000 * max(times[name]),
            "s_to_folded": seconds[name] / seconds["srp, folded"],
            "s_to_din": seconds[name] / seconds["din, folded"],
        }
        for name in contestants
    ]


def random_requests(spec: IdsSpec, requests: int, history: int, candidates: int, seed: int = 0) -> Batch:
    """`requests` of `candidates` each, behind `history` behaviours."""
    chance = torch.Generator().manual_seed(seed)
    axes = {"behaviours": Axis.of(np.full(requests, history)), "targets": Axis.of(np.full(requests, candidates))}
    inputs: dict[str, torch.Tensor] = {"base": torch.zeros(axes["targets"].total)}
    for prefix, side, axis in (("", spec.behaviours, "behaviours"), ("target_", spec.target, "targets")):
        rows = axes[axis].total
        categories, numbers = of_kind(side, numbers=False), of_kind(side, numbers=True)
        columns = [torch.randint(spec.rows if name in spec.ids else FEEDBACKS, (rows,), generator=chance) for name in categories]
        inputs[f"{prefix}signals"] = torch.stack(columns, 1)
        inputs[f"{prefix}numbers"] = torch.randn(rows, len(numbers), generator=chance)
    return _batch(axes, inputs)


def unfolded(batch: Batch) -> Batch:
    """The same candidates, each behind a history of its own."""
    behaviours, targets = batch.axes["behaviours"], batch.axes["targets"]
    of = targets.owner.numpy()
    lengths = behaviours.lengths[of]
    again = Axis.of(lengths)
    rows = behaviours.offsets[torch.from_numpy(of)][again.owner] + again.place
    inputs = {name: value[rows] if name in ("signals", "numbers") else value for name, value in batch.inputs.items()}
    return _batch({"behaviours": again, "targets": Axis.of(np.ones(len(of), np.int64))}, inputs)


def _batch(axes: dict[str, Axis], inputs: dict[str, torch.Tensor]) -> Batch:
    targets, behaviours = axes["targets"], axes["behaviours"]
    seen = behaviours.offsets.diff()[targets.owner]
    zeros = torch.zeros(targets.total, dtype=torch.int64)
    return Batch(
        targets=Targets(torch.zeros(targets.total), zeros, zeros, zeros, torch.ones(targets.total, dtype=torch.bool)),
        inputs=inputs | {"seen": seen},
        axes=axes,
        tokens=behaviours.total + targets.total,
        impressions=targets.total,
        costs={"pairs": int(seen.sum())},
    )


def _ready(model: CTRModule, device: str) -> CTRModule:
    return model.eval().requires_grad_(False).to(device)


def _seconds(forward: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    with torch.inference_mode():
        forward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def text(report: dict[str, Any]) -> str:
    """The report as Markdown; figures are those of a request."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    columns = {
        "contestant": "contestant", "candidates": "candidates", "MFLOPs": "mflops", "/ folded": "flops_to_folded",
        "/ din": "flops_to_din", "ms": "ms", "fastest": "fastest", "slowest": "slowest", "ms / folded": "s_to_folded",
        "ms / din": "s_to_din",
    }  # fmt: skip
    rows = [[row[key] for key in columns.values()] for row in report["passes"]]
    return f"{machine_line(report['machine'])}\n\n{settings}\n\n" + markdown(list(columns), rows)


if __name__ == "__main__":
    sys.exit(main())
