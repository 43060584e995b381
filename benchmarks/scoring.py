"""Scoring many candidates of one user: one request of all of them behind one history, against a request for each.

The scorer of an exported model with random weights, from parsed requests to probabilities: text, tokens, sequences, model.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.report import machine, machine_line, markdown
from benchmarks.shapes import SHAPES, VOCABULARY, shape_of
from ctrsink import strict_json
from ctrsink.config.data import TextSpec, TokenizerSpec
from ctrsink.config.model import BackboneSpec, BiasSpec, DecoderSpec, SinkSpec
from ctrsink.config.stages import Objective, ReadoutSpec
from ctrsink.dataset.layout import Layout
from ctrsink.families.facts import Facts
from ctrsink.families.hf import CLASSES
from ctrsink.prepare.tokenize import make_tokenizer
from ctrsink.serve import Scorer
from ctrsink.serve.load import Loaded
from ctrsink.serve.requests import Request

WORDS = ("iron", "river", "the", "long", "night", "of", "glass", "seven", "winters", "home")


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    report = run(args)
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.scoring", description=__doc__)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["tiny", "smollm2"])
    parser.add_argument("--history", type=int, default=50, help="behaviours (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=64, help="of one user (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="the median is told")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every shape and return all figures."""
    found = machine()
    torch.set_num_threads(args.threads)
    names = ("history", "candidates", "repeats", "threads")
    return {
        "machine": found,
        "settings": {name: getattr(args, name) for name in names},
        "scoring": [measure(args, shape) for shape in args.shape],
    }


def measure(args: argparse.Namespace, shape: str) -> dict[str, Any]:
    """Seconds of either way with one shape, and how far their probabilities differ."""
    chance = np.random.default_rng(0)
    scorer = Scorer(random_model(shape, args.history))
    tree = request_tree(chance, args.history, args.candidates)
    together = scorer.parse(tree, "request")
    apart = [scorer.parse(tree | {"candidates": [item]}, "request") for item in tree["candidates"]]
    times: dict[str, list[float]] = {"together": [], "apart": []}
    answers: dict[str, list[float]] = {}
    _score(scorer, [together, apart[0]])  # to warm up
    for _ in range(args.repeats):
        for way, requests in (("together", [together]), ("apart", apart)):
            taken, answers[way] = _timed(lambda asked=requests: _score(scorer, asked))
            times[way].append(taken)
    seconds = {way: median(taken) for way, taken in times.items()}
    difference = np.abs(np.subtract(answers["together"], answers["apart"])).max()
    return {
        "shape": shape,
        **seconds,
        "ratio": seconds["apart"] / seconds["together"],
        "largest_difference": float(difference),
        "spread": float(np.ptp(answers["apart"])),
    }


def _score(scorer: Scorer, requests: list[Request]) -> list[float]:
    return [probability for request in requests for probability in scorer.probabilities(request, "request")]


def _timed(work: Callable[[], list[float]]) -> tuple[float, list[float]]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def random_model(shape: str, history: int, readout: ReadoutSpec | None = None) -> Loaded:
    """A random model with sinks, and the inter-sink bias in half of its layers."""
    tokenizer = make_tokenizer(TokenizerSpec(train_vocabulary=VOCABULARY), [" ".join(WORDS)])
    layout = Layout("decoder", "per_target", history, 1, ("previous_gap",), SinkSpec().buckets)
    backbone = BackboneSpec(config=shape_of(shape) | {"vocab_size": VOCABULARY})
    spec = DecoderSpec(backbone=backbone, sinks=SinkSpec(signals=("previous_gap",)), bias=BiasSpec(layers=0.5))
    config_class, model_class = CLASSES[spec.family]
    config = config_class(
        model=spec.model_dump(mode="json"),
        facts=dataclasses.asdict(Facts(VOCABULARY)),
        objective=Objective(readout=readout or ReadoutSpec()).model_dump(mode="json"),
        layout=dataclasses.asdict(layout),
        text=TextSpec(separator="").model_dump(mode="json"),
        prefix_tokens=[],
    )
    torch.manual_seed(0)
    return Loaded(model_class(config).eval(), tokenizer, encoder=None, knowledge=None)


def request_tree(chance: np.random.Generator, history: int, candidates: int) -> dict[str, Any]:
    """A request as JSON; titles of eight words, each word a token or a few."""

    def item() -> dict[str, str]:
        return {"title": " ".join(chance.choice(WORDS, 8))}

    past = [{"item": item(), "feedback": float(chance.integers(1, 6)), "timestamp": 1000.0 * i} for i in range(history)]
    return {"history": past, "candidates": [item() for _ in range(candidates)], "timestamp": 1000.0 * history}


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    header = ["shape", "s together", "s one by one", "ratio", "largest difference", "spread of the scores"]
    keys = ["shape", "together", "apart", "ratio", "largest_difference", "spread"]
    table = markdown(header, [[row[key] for key in keys] for row in report["scoring"]])
    return f"{machine_line(report['machine'])}\n\n{settings}\n\n{table}"


if __name__ == "__main__":
    sys.exit(main())
