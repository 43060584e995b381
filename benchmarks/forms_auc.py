"""Test AUC of `per_user` beside `per_target`: a tiny model with sinks, trained for equal time and on equally many impressions.

Time is the processor's, on one thread, so that other work on the machine does not count. All are tested on the same random
sample of test impressions, each behind a `per_target` history: of as many behaviours as training showed at most.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.report import machine, machine_line, markdown
from benchmarks.training import Trainee, prepare_once, run_of, stream_of, trainee_of
from ctrsink import logs, strict_json
from ctrsink.config import RunSpec
from ctrsink.config.train import EvaluateSpec
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.evaluate.evaluator import predict
from ctrsink.families.registry import family_of
from ctrsink.runtime.preflight import check
from ctrsink.stream.stream import Step

TRAINED = ("sink", "bias", "head", "backbone")
BATCH = {"per_target": 64, "per_user": 8}  # sequences of a step
# Two-sided 95 % points of Student's t, by number of seeds.
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


@dataclass(frozen=True)
class Trained:
    """What one training of one seed came to."""

    contestant: str
    seed: int
    impressions: int
    seconds: float
    """Of one processor core."""
    auc: float
    gauc: float
    logloss: float


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    logs.configure()
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = run(args, Path(args.work or folder).resolve())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.forms_auc", description=__doc__)
    parser.add_argument("log", help="folder of a MovieLens data set as published, 100K or 1M")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a training, on one core (default: %(default)s)")
    parser.add_argument("--seeds", type=int, choices=list(STUDENT), default=3)
    parser.add_argument("--history", type=int, default=20, help="behaviours before the first target, at most")
    parser.add_argument("--targets", type=int, default=50, help="per_user: impressions of a sequence, at most")
    parser.add_argument("--lr", type=float, default=0.003, help="after a warm-up, falling to 0 (default: %(default)s)")
    parser.add_argument("--sample", type=int, default=3000, help="test impressions (default: %(default)s)")
    parser.add_argument("--work", metavar="DIR", help="keeps the prepared data for the next run")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args()


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train and test everybody, seed by seed.

    Raises:
        InputError: the log cannot be used.
    """
    import torch

    found = machine()
    torch.set_num_threads(1)
    done: list[Trained] = []
    for seed in range(args.seeds):
        per_target, per_user = (spec_of(args, folder, examples, seed) for examples in ("per_target", "per_user"))
        prepare_once(per_target)
        slow = trained(args, per_target, "per_target", seconds=args.seconds)
        # For as long as per_target really took, and on as many impressions as it saw.
        equal_time = trained(args, per_user, "per_user, equal time", seconds=slow.seconds)
        equal_data = trained(args, per_user, "per_user, equal impressions", impressions=slow.impressions)
        done += [slow, equal_time, equal_data]
    names = ("seconds", "seeds", "history", "targets", "lr", "sample")
    return {
        "machine": found,
        "settings": {name: getattr(args, name) for name in names} | {"log": Path(args.log).name},
        "runs": [asdict(one) for one in done],
        "summary": _summary(done),
    }


def spec_of(args: argparse.Namespace, folder: Path, examples: str, seed: int) -> RunSpec:
    """The run of one form of examples."""
    sections = {
        "prepare": {"source": {"path": str(Path(args.log).resolve())}},
        "data": {"uri": str(folder / "data"), "examples": examples, "history": args.history, "targets": args.targets},
        "model": {"sinks": {"signals": ["previous_gap"]}, "bias": {"layers": 0.5}, "attention": "blocks"},
        "stages": [{"name": "all", "trainable": list(TRAINED), "lr": dict.fromkeys(TRAINED, args.lr), "steps": 1}],
        "train": {"batch_size": BATCH[examples], "micro_batch_tokens": 16384},
        "seed": seed,
    }
    return run_of(folder / "runs", f"{examples}-{seed}", ["data/movielens-1m.yaml", "model/tiny-llama.yaml"], sections)


def trained(args: argparse.Namespace, spec: RunSpec, name: str, seconds: float = inf, impressions: float = inf) -> Trained:
    """Train for so many seconds or impressions and test; the learning rate follows the share of it that is done."""
    trainee = trainee_of(spec, check(spec))
    seen, taken, began = 0, 0.0, time.process_time()
    for step in stream_of(spec):
        done = max(taken / seconds, seen / impressions)
        if done >= 1:
            break
        _take(trainee, step, args.lr * min(1.0, done / 0.05 + 0.02) * (1 - done))
        seen += step.impressions
        taken = time.process_time() - began
    metrics = tested(args, spec, trainee)
    return Trained(name, spec.seed, seen, taken, *(metrics[key] for key in ("auc", "gauc", "logloss")))


def _take(trainee: Trainee, step: Step, rate: float) -> None:
    for group in trainee.optimizer.param_groups:
        group["lr"] = rate
    trainee.step(step.micro_batches)


def tested(args: argparse.Namespace, spec: RunSpec, trainee: Trainee) -> dict[str, float]:
    """Metrics on the sample: the same impressions for every form, as sequences of one target."""
    dataset = Dataset(spec.data.uri, 2 * spec.data.shuffle_shards)
    layout = family_of(spec.model.family).layout(spec.data, spec.model, dataset.manifest)
    most = layout.history + layout.targets - 1
    alone = replace(layout, examples="per_target", history=most, targets=1)
    model = trainee.model.eval()
    forward = lambda batch: model(batch, trainee.objective)  # noqa: E731
    return predict(forward, dataset, "test", alone, EvaluateSpec(batch_size=32, max_sequences=args.sample)).metrics()


def _summary(runs: list[Trained]) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys(one.contestant for one in runs):
        own = [one for one in runs if one.contestant == name]
        width = STUDENT[len(own)] * stdev(one.auc for one in own) / len(own) ** 0.5
        averages = {key: mean(getattr(one, key) for one in own) for key in ("impressions", "seconds", "auc", "gauc", "logloss")}
        rows.append({"contestant": name, **averages, "interval": width})
    return rows


def text(report: dict[str, Any]) -> str:
    """The report as Markdown; AUC to four digits, with its 95 % interval over seeds."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    header = ["contestant", "impressions", "s of a core", "test AUC", "95 % interval, +-", "AUC by user", "log loss"]
    rows = [
        [
            r["contestant"],
            round(r["impressions"]),
            round(r["seconds"]),
            *(f"{r[k]:.4f}" for k in ("auc", "interval", "gauc", "logloss")),
        ]
        for r in report["summary"]
    ]
    seeds = ", ".join(f"{one['contestant']} {one['auc']:.4f}" for one in report["runs"])
    return f"{machine_line(report['machine'])}\n\n{settings}\n\n{markdown(header, rows)}\n\nBy seed: {seeds}"


if __name__ == "__main__":
    sys.exit(main())
