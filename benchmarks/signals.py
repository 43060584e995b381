"""What signals cost: how fast the loader builds batches with none, some and all of them, and what they add to a training step.

One process of one thread on a prepared data set with neighbours and fields. The variants of a round follow one another, and each
figure is a ratio of the same round; time is the processor's.
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.report import machine, machine_line, markdown
from benchmarks.training import Trainee, stream_of, trainee_of
from ctrsink import logs, strict_json
from ctrsink.config import RunSpec, load_run
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.families.registry import family_of, source_of
from ctrsink.runtime.preflight import check
from ctrsink.stream.stream import Step

_NO_BIAS = ("model.similarity=null", "stages.0.trainable=[sink, head, backbone]")
# From the run that `--config` names: what each variant takes away.
VARIANTS: dict[str, tuple[str, ...]] = {
    "all signals": (),
    "without similarity": (*_NO_BIAS,),
    "sinks, no target signals": (*_NO_BIAS, "model.target=null"),
    "sinks that tell the gap": (*_NO_BIAS, "model.target=null", "model.sinks.signals=[previous_gap]"),
}
REFERENCE = "sinks that tell the gap"
AT_ONCE = 64  # sequences


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/movielens-1m.yaml")
    parser.add_argument("--sequences", type=int, default=4096, help="built in a round by each variant")
    parser.add_argument("--steps", type=int, default=30, help="taken in a round by each variant")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    logs.configure()
    torch.set_num_threads(1)
    try:
        report = run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of all variants: impressions per second of the loader, shards read and not, and seconds of a step."""
    found_machine = machine()
    specs = {name: load_run(args.config, [*own, *args.overrides]) for name, own in VARIANTS.items()}
    loaders = {name: _loader(spec, args.sequences) for name, spec in specs.items()}
    trainees = {name: (_steps(spec, args.steps), trainee_of(spec, check(spec))) for name, spec in specs.items()}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in specs}
    for _ in range(args.repeats):
        for name in specs:
            cold, warm = loaders[name](True), loaders[name](False)
            rounds[name].append({"loader_with_reading": cold, "loader": warm, "step_s": _step_seconds(*trainees[name])})
    return {"machine": found_machine, "reference": REFERENCE, "rounds": rounds}


def _loader(spec: RunSpec, sequences: int) -> Callable[[bool], float]:
    """Impressions per second of the processor; `reading`: with the time to read the shards and to compute their signals."""
    dataset = Dataset(spec.data.uri, 64)
    layout = family_of(spec.model.family).layout(spec.data, spec.model, dataset.manifest)

    def measure(reading: bool) -> float:
        source = source_of(dataset if not reading else Dataset(spec.data.uri, 64), "train", layout)
        ids = np.arange(min(sequences, sum(source.per_shard)))
        if not reading:
            source.build(ids[:1])
            dataset.shards(list(range(len(dataset.manifest.shards))))
        began, count = time.process_time(), 0
        for start in range(0, len(ids), AT_ONCE):
            count += source.build(ids[start : start + AT_ONCE]).impressions
        return count / (time.process_time() - began)

    return measure


def _steps(spec: RunSpec, count: int) -> list[Step]:
    return list(islice(stream_of(spec), count))


def _step_seconds(steps: list[Step], trainee: Trainee) -> float:
    began = time.process_time()
    for step in steps:
        trainee.step(step.micro_batches)
    return (time.process_time() - began) / len(steps)


def text(report: dict[str, Any]) -> str:
    """The machine and one table: medians over the rounds, and the ratio of a step to that of the reference in the same round."""
    rows = []
    reference = report["rounds"][report["reference"]]
    for name, rounds in report["rounds"].items():
        ratio = median(own["step_s"] / other["step_s"] for own, other in zip(rounds, reference, strict=True))
        loader, cold = (median(own[key] for own in rounds) for key in ("loader", "loader_with_reading"))
        rows.append(
            [name, f"{loader:,.0f}", f"{cold:,.0f}", f"{1000 * median(own['step_s'] for own in rounds):.0f}", f"{ratio:.2f}"]
        )
    header = ["variant", "loader, impressions/s", "with reading shards", "step, ms", "step, ratio"]
    return f"{machine_line(report['machine'])}\n\n{markdown(header, rows)}"


if __name__ == "__main__":
    sys.exit(main())
