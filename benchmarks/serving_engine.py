"""The model's side of serving: a request of many candidates, whole, behind a history that is kept, and one by one.

Ways alternate, request by request, so that their ratios come from one run: `one by one` is the scorer with a request for each
candidate, `whole` all of them behind one history, `cold` the same with the history kept for later, `cached` the same request once
more, `grown` the request after one more behaviour, and `transformers` a plain forward of the text of history and candidate, for
each candidate. Times are from the parsed request to its probabilities. Of the two slow ways a part of the candidates is timed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from benchmarks.report import machine, machine_line, markdown
from benchmarks.scoring import random_model, request_tree
from benchmarks.shapes import SHAPES
from ctrsink import strict_json
from ctrsink.attention.kinds import SINK
from ctrsink.config import load_run
from ctrsink.config.stages import ReadoutSpec
from ctrsink.dataset.manifest import read_manifest
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.export.package import export_run
from ctrsink.run.folder import claim
from ctrsink.serve import Scorer, request_of
from ctrsink.serve.load import Loaded, load_model
from ctrsink.train.checkpoint.checkpoint import Checkpoint, save_checkpoint
from launchers.one_process import train

CONFIG = "configs/ctr-sink.yaml"
WAYS = ("whole", "cold", "cached", "grown")
SINKS = ReadoutSpec(over="sinks", form="attend")
Way = Callable[[], list[float]]


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    try:
        report = run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.serving_engine", description=__doc__)
    parser.add_argument("--shape", nargs="*", choices=list(SHAPES), default=["smollm2"], help="of random decoders")
    parser.add_argument("--data", metavar="DIR", help=f"data set of {CONFIG}, on which its model is trained for --steps steps")
    parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--history", type=int, default=50, help="behaviours (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=20, help="of as many users (default: %(default)s)")
    parser.add_argument("--alone", type=int, default=10, help="candidates timed of ways that take each by itself")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every model and return all figures."""
    found = machine()
    torch.set_num_threads(args.threads)
    names = ("history", "candidates", "requests", "alone", "threads")
    models: dict[str, Any] = {}
    if args.data is not None:
        with tempfile.TemporaryDirectory() as folder:
            loaded = load_model(demo_model(args.data, args.steps, folder))
        models["demo"] = measure(args, loaded, _from_data(Dataset(args.data), args))
    for shape in args.shape:
        chance = np.random.default_rng(0)
        trees = [request_tree(chance, args.history + 1, args.candidates) for _ in range(args.requests)]
        models[shape] = measure(args, random_model(shape, args.history + 1, SINKS), trees)
    return {"machine": found, "settings": {name: getattr(args, name) for name in names}, "models": models}


def demo_model(data: str, steps: int, folder: str) -> str:
    """The folder of the model of CONFIG, trained for so many steps."""
    stage = {"name": "all", "trainable": ["sink", "bias", "head", "backbone"], "steps": steps, "schedule": {"final": 0}}
    stage["lr"] = dict.fromkeys(stage["trainable"], 0.0015)
    spec = load_run(CONFIG, [f"data.uri={data}", f"run_dir={folder}/run", f"stages={json.dumps([stage])}", "runtime.workers=1"])
    identity = read_manifest(data).identity
    claim(spec, resume=True, datasets=(identity,))
    for line in train(spec, f"{folder}/weights.safetensors"):
        print(line, file=sys.stderr)
    weights = load_file(f"{folder}/weights.safetensors")
    save_checkpoint(spec.run_dir, Checkpoint(steps, steps * spec.batch_size(spec.stages[0]), weights, {}, {}, identity))
    export_run(spec.run_dir, f"{folder}/out")
    return f"{folder}/out"


def _from_data(dataset: Dataset, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The latest behaviours of users who have enough of them, and items drawn at random."""
    chance, trees = np.random.default_rng(0), []
    counts = np.sum([dataset.index[f"{part}_events"] for part in ("past", "train", "valid", "test")], axis=0)
    for user, events in enumerate(counts.tolist()):
        if events > args.history + 1 and len(trees) < args.requests:
            items = chance.integers(0, dataset.manifest.item_count, args.candidates).tolist()
            tree = request_of(dataset, user, events - 1, items)
            if len(tree["history"]) > args.history:
                trees.append(tree | {"history": tree["history"][-args.history - 1 :]})
    return trees


def measure(args: argparse.Namespace, loaded: Loaded, trees: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of each way, how far probabilities differ from those of `whole`, and bytes that are kept."""
    plain, kept = Scorer(loaded), Scorer(loaded, history_bytes=2**32)
    assert kept.histories is not None
    backbone = _plain_backbone(loaded)
    times: dict[str, list[tuple[float, float]]] = {}
    difference = dict.fromkeys((*WAYS, "one by one"), 0.0)
    for number, tree in enumerate([trees[0], *trees]):  # the first to warm up
        longer = tree | {"user": f"user {number}"}
        shorter = longer | {"history": longer["history"][:-1]}
        alone = [shorter | {"candidates": [item]} for item in shorter["candidates"][: args.alone]]
        ids = [_text_of(plain, one) for one in alone]
        answers: dict[str, list[float]] = {}
        ways: dict[str, tuple[Way, int]] = {
            "transformers": (lambda ids=ids: [float(_forward(backbone, one)) for one in ids], args.alone),
            "one by one": (lambda alone=alone: [value for one in alone for value in plain.score(one)], args.alone),
            "whole": (lambda of=shorter: plain.score(of), args.candidates),
            "cold": (lambda of=shorter: kept.score(of), args.candidates),
            "cached": (lambda of=shorter: kept.score(of), args.candidates),
            "grown": (lambda of=longer: kept.score(of), args.candidates),
        }
        for name, (way, count) in ways.items():
            wall, core, answers[name] = _timed(way)
            if number:
                times.setdefault(name, []).append((wall / count * args.candidates, core / count * args.candidates))
        answers["whole, grown"] = plain.score(longer)
        for name in difference:
            expected = answers["whole, grown" if name == "grown" else "whole"][: len(answers[name])]
            difference[name] = max(difference[name], float(np.abs(np.subtract(answers[name], expected)).max()))
    seconds = {name: np.array(taken) for name, taken in times.items()}
    return {
        "ways": {name: _figures(of, seconds, args.candidates) for name, of in seconds.items()},
        "difference": difference,
        "bytes": _bytes(loaded, trees[0]),
        "counts": vars(kept.histories.counts),
    }


def _figures(of: np.ndarray, seconds: dict[str, np.ndarray], candidates: int) -> dict[str, float]:
    """Of seconds by the clock and of cores, [N, 2]; by cores how many times faster than the two slow ways."""
    p50, core = np.quantile(of, 0.5, axis=0).tolist()
    times = {f"than {name}": float(np.median(seconds[name][:, 1])) / core for name in ("one by one", "transformers")}
    p99 = float(np.quantile(of[:, 0], 0.99))
    return {"p50": p50, "p99": p99, "candidates_s": candidates / p50, "core_s": core, **times}


def _bytes(loaded: Loaded, tree: dict[str, Any]) -> dict[str, int]:
    """What is kept of one history; of its sinks alone, where candidates see nothing else."""
    sinks = loaded.model.ctr.narrows(loaded.model.objective)
    found = {}
    for name in ("all", *(["sinks"] if sinks else [])):
        scorer = Scorer(loaded, history_bytes=2**32, sinks_only=name == "sinks")
        scorer.score(tree | {"user": "one"})
        assert scorer.histories is not None
        found[name] = scorer.histories.nbytes
    return found


def _text_of(scorer: Scorer, tree: dict[str, Any]) -> torch.Tensor:
    """The tokens of a request of one candidate without its sinks, int64 [1, L]."""
    columns = scorer.encode(scorer.parse(tree, "request"), "request").sequences.columns
    return torch.from_numpy(columns["input_ids"][columns["kinds"] != SINK])[None]


def _plain_backbone(loaded: Loaded) -> Any:
    """The decoder of the model as transformers has it, with its own sdpa attention and random weights."""
    ours: Any = loaded.model.ctr.backbone
    plain = ours.config.to_dict()
    config = AutoConfig.for_model(**{name: value for name, value in plain.items() if not name.startswith("_attn")})
    return AutoModel.from_config(config, attn_implementation="sdpa").eval()


@torch.inference_mode()
def _forward(backbone: Any, ids: torch.Tensor) -> torch.Tensor:
    return backbone(input_ids=ids, use_cache=False).last_hidden_state[0, -1, 0]


def _timed(work: Way) -> tuple[float, float, list[float]]:
    """Seconds by the clock, seconds of cores, and the result."""
    wall, core = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - core, result


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    parts = [machine_line(report["machine"]), settings]
    header = ["way", "p50 s", "p99 s", "candidates/s", "s of a core"]
    header += ["times faster than one by one", "than transformers", "largest difference"]
    for name, of in report["models"].items():
        rows = [[way, *row.values(), of["difference"].get(way)] for way, row in of["ways"].items()]
        parts += [f"{name}: kept bytes {of['bytes']}, {of['counts']}", markdown(header, rows)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
