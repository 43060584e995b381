"""Impressions and useful tokens per second of LoRA training on CPU, for each form of examples; beside the published code's form.

The data path, the model and the step are those of training, in one process without Ray and DeepSpeed: forward, backward,
clipping, AdamW. All contestants train in one run, round by round, `published.py` among them.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

from benchmarks.published import Published
from benchmarks.raw import synthetic_log
from benchmarks.report import machine, machine_line, markdown
from benchmarks.training import Trainee, Work, prepare_once, rates, run_of, stream_of, trainee_of, work_for
from ctrsink import logs, strict_json
from ctrsink.config import RunSpec
from ctrsink.config.data import DataSpec
from ctrsink.errors import InputError
from ctrsink.runtime.preflight import check
from ctrsink.stream.stream import Step

# The published code with SmolLM2-135M on two cores of another machine (an Intel with AMX): batches of 8, two histories of 50
# behaviours per impression, each padded to 512 tokens, half of the layers on tokens, fp32.
PUBLISHED_IMPRESSIONS_PER_S = 0.28
PUBLISHED_MODEL = "smollm2-135m"
MODELS = {PUBLISHED_MODEL: "model/smollm2-135m.yaml", "tiny-llama": "model/tiny-llama.yaml"}
EXAMPLES: tuple[str, ...] = get_args(DataSpec.model_fields["examples"].annotation)
PRECISIONS = ("fp32", "bf16")

log = logging.getLogger("ctrsink.benchmarks")
PUBLISHED_FORM = "the published form"
PIECE = 8  # impressions that per_request deals out at once, at most: each may be a sequence of its own

Who = tuple[str, str]
"""A form of examples, or PUBLISHED_FORM, and a precision."""


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    logs.configure()
    try:
        if args.work:
            report = run(args, Path(args.work).resolve())
        else:
            with tempfile.TemporaryDirectory() as folder:
                report = run(args, Path(folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.model_training", description=__doc__)
    parser.add_argument("log", nargs="?", help="folder of MovieLens-1M as published (default: a synthetic log)")
    parser.add_argument("--events", type=int, default=20_000, help="size of the synthetic log (default: %(default)s)")
    parser.add_argument("--model", choices=list(MODELS), default=PUBLISHED_MODEL)
    parser.add_argument("--examples", nargs="+", choices=EXAMPLES, default=list(EXAMPLES))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--no-published", action="store_true", help="leave the published form out; its steps are long")
    parser.add_argument(
        "--attention", choices=["blocks", "sdpa"], default="blocks", help="backend of ours (default: %(default)s)"
    )
    parser.add_argument("--window", type=int, help="events that a position sees (default: all of its sequence)")
    parser.add_argument("--history", type=int, default=50, help="behaviours before the first target, at most")
    parser.add_argument("--targets", type=int, default=200, help="per_user: impressions of a sequence, at most")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a step")
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch, at most")
    parser.add_argument("--bias-layers", type=float, default=1.0, help="share of the layers that carry the bias (default: all)")
    parser.add_argument("--no-sinks", action="store_true", help="the plain language model")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median is told")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each contestant in each round, at least one step")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--processor-time", action="store_true", help="seconds of a core, for a busy machine; with --threads 1")
    parser.add_argument("--work", metavar="DIR", help="keeps the model and the prepared data for the next run")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args()


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare below `folder` what is not there, train, and return all figures.

    Raises:
        InputError: the log or the model cannot be had.
    """
    import torch

    found = machine()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.processor_time else time.perf_counter
    everybody: dict[Who, RunSpec] = {}
    for precision in args.precision:
        for examples in args.examples:
            everybody[examples, precision] = spec_of(args, folder, examples, precision)
    for spec in everybody.values():
        prepare_once(spec)
    # One model per precision: the forms of examples train the same parameters.
    models: dict[str, Trainee] = {}
    for (_, precision), spec in everybody.items():
        if precision not in models:
            models[precision] = trainee_of(spec, check(spec))
    turns: dict[Who, Callable[[float, Callable[[], float]], Work]] = {}
    if not (args.no_published or args.no_sinks):
        spec = next(iter(everybody.values()))
        turns[PUBLISHED_FORM, "fp32"] = Published(spec, check(spec)).work
    for who, spec in everybody.items():
        turns[who] = partial(_work, models[who[1]], stream_of(spec))
    rounds: dict[Who, list[Work]] = {who: [] for who in turns}
    for number in range(args.repeats + 1):
        for who, turn in turns.items():
            work = turn(args.seconds if number else 0.0, clock)
            log.info("round %d, %s %s: %.2f impressions/s", number, *who, work.impressions / work.seconds)
            if number:  # the first round is the warm-up, one step each
                rounds[who].append(work)
    names = (
        "model",
        "attention",
        "window",
        "history",
        "targets",
        "batch_size",
        "tokens",
        "bias_layers",
        "no_sinks",
        "repeats",
        "seconds",
        "threads",
        "processor_time",
    )
    return {
        "machine": found,
        "settings": {name: getattr(args, name) for name in names} | {"log": "given" if args.log else "synthetic"},
        "published_impressions_per_s": PUBLISHED_IMPRESSIONS_PER_S,
        "speed": _rows(rounds, args.model),
    }


def _work(trainee: Trainee, steps: Iterator[Step], seconds: float, clock: Callable[[], float]) -> Work:
    return work_for(lambda taken: trainee.step(taken.micro_batches), steps, seconds, clock=clock)


def spec_of(args: argparse.Namespace, folder: Path, examples: str, precision: str) -> RunSpec:
    """The run of one contestant; the model is fetched where it is not there."""
    data = "data/movielens-1m.yaml" if args.log else "data/synthetic.yaml"
    prepare: dict[str, Any] = {"source": {"path": str(Path(args.log).resolve())}} if args.log else _synthetic(folder, args.events)
    # A log without request ids: what one user met in one second is a request.
    prepare["request_is_second"] = shared = examples == "per_request"
    model: dict[str, Any] = {
        # A signal that does not depend on the target suits every form of examples.
        "sinks": None if args.no_sinks else {"signals": ["previous_gap"]},
        "bias": None if args.no_sinks else {"layers": args.bias_layers},
        "lora": {"rank": 8, "alpha": 16},
        "attention": args.attention,
        "window": args.window,
    }
    if args.model == PUBLISHED_MODEL:
        from ctrsink.prepare.pretrained import get_pretrained

        path = str(get_pretrained(args.model, folder / "models" / args.model))
        model["backbone"] = {"path": path}
        prepare["tokenizer"] = {"path": path, "train_vocabulary": None}
    trainable = ["head", "lora"] if args.no_sinks else ["sink", "bias", "head", "lora"]
    sections = {
        "prepare": prepare,
        "data": {
            "uri": str(folder / "data" / f"{'movielens' if args.log else args.events}-{args.model}{'-requests' * shared}"),
            "examples": examples,
            "history": args.history,
            "targets": args.targets if examples == "per_user" else min(args.targets, PIECE),
        },
        "model": model,
        "stages": [{"name": "all", "trainable": trainable, "lr": dict.fromkeys(trainable, 1e-4), "steps": 1}],
        "train": {"batch_size": args.batch_size, "micro_batch_tokens": args.tokens, "precision": precision},
    }
    return run_of(folder / "runs", f"{examples}-{precision}", [data, MODELS[args.model]], sections)


def _synthetic(folder: Path, events: int) -> dict[str, Any]:
    place = folder / f"synthetic-{events}"
    if not place.exists():
        place.mkdir(parents=True)
        synthetic_log(place, events)
    return {"source": {"path": str(place / "raw/events"), "items": str(place / "raw/items.csv")}}


def _rows(rounds: dict[Who, list[Work]], model: str) -> list[dict[str, Any]]:
    found = {who: rates(done) for who, done in rounds.items()}
    form = found.get((PUBLISHED_FORM, "fp32"))
    rows = []
    for (examples, precision), rate in found.items():
        speed = rate["impressions_per_s"]
        rows.append(
            {
                "examples": examples,
                "precision": precision,
                **rate,
                "ratio_to_form": form and speed / form["impressions_per_s"],
                # Of another model the ratio would say nothing.
                "ratio_to_published": speed / PUBLISHED_IMPRESSIONS_PER_S if model == PUBLISHED_MODEL else None,
            }
        )
    return rows


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    header = [
        "examples",
        "precision",
        "impressions/s",
        "slowest",
        "fastest",
        "useful tokens/s",
        "s/step",
        "steps",
        "x form",
        "x 0.28",
    ]
    keys = ["examples", "precision", "impressions_per_s", "slowest", "fastest", "tokens_per_s", "s_per_step", "steps"]
    rows = [[row[key] for key in (*keys, "ratio_to_form", "ratio_to_published")] for row in report["speed"]]
    published = (
        "x form: against the published form in this run; "
        f"x 0.28: against {report['published_impressions_per_s']} impressions/s of the published code on another machine."
    )
    return f"{machine_line(report['machine'])}\n\n{settings}\n\n{markdown(header, rows)}\n\n{published}"


if __name__ == "__main__":
    sys.exit(main())
