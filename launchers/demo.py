"""The main job on MovieLens-100K, from the log to scores: CTR-Sink beside the same language model without sinks."""

import argparse
import io
import json
import logging
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ctrsink import logs, storage, strict_json, terminal
from ctrsink.config import RunSpec, load_run
from ctrsink.config.model import DecoderSpec
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError, RunError
from ctrsink.evaluate.baselines import smoothed_item_mean
from ctrsink.evaluate.metrics import all_metrics, no_better_than_the_mean
from ctrsink.export.package import export_run
from ctrsink.prepare.build import prepare
from ctrsink.prepare.download import download
from ctrsink.report.figures import compare_runs
from ctrsink.runtime.start import start
from ctrsink.serve import Scorer
from ctrsink.serve.requests import request_of
from ctrsink.studies.report import write_report
from ctrsink.text_table import aligned

log = logging.getLogger("ctrsink.demo")
ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {
    "tiny": {"LM-CTR": "configs/lm-ctr.yaml", "CTR-Sink": "configs/ctr-sink.yaml"},
    "smollm2": {"LM-CTR": "configs/lm-ctr-smollm2.yaml", "CTR-Sink": "configs/ctr-sink-smollm2.yaml"},
}


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(CONFIGS), default="tiny")
    parser.add_argument("--folder", default=None, help="where everything is written (default: runs/demo-MODEL)")
    parser.add_argument("--verbose", action="store_true", help="show what libraries say, which else goes into a file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for both runs")
    args = parser.parse_args()
    os.chdir(ROOT)
    folder = args.folder or f"runs/demo-{args.model}"
    said = Path(folder, "libraries.log")
    said.unlink(missing_ok=True)
    try:
        with nullcontext() if args.verbose else terminal.quiet(logs.relay, said):
            logs.configure()
            if not args.verbose:
                log.info("what libraries say is in %s; --verbose shows it here", said)
            try:
                run_demo(args.model, folder, args.overrides)
            finally:
                logs.clear()
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def run_demo(model: str, folder: str, overrides: list[str]) -> None:
    """Everything, step by step; what an earlier demo left in `folder` is replaced."""
    started = time.monotonic()
    specs = {label: load_run(path, [f"run_dir={folder}/{Path(path).stem}", *overrides]) for label, path in CONFIGS[model].items()}
    sink = specs["CTR-Sink"]
    export = f"{folder}/export"
    for old in (export, *(spec.run_dir for spec in specs.values())):
        storage.delete(old)
    get_ready(model, sink)
    results = {label: start(spec) for label, spec in specs.items()}
    dataset = Dataset(sink.data.uri)
    rows = [row_of(label, result["evaluation"], result) for label, result in results.items()]
    floor = {split: floor_of(dataset, split, sink.run_dir) for split in ("valid", "test")}
    rows.insert(0, row_of("item mean", floor, None))
    export_run(sink.run_dir, export)
    looked_at = 64 if model == "tiny" else 8  # sequences: each is read once for every signal
    page = write_report(sink.run_dir, f"{folder}/report.html", sequences=looked_at)["report"]
    figures = compare_runs({label: spec.run_dir for label, spec in specs.items()}, f"{folder}/figures/runs.png")
    example = score_one_user(dataset, export, folder)
    table = as_table(rows)
    report = {"seed": sink.seed, "rows": rows, "seconds": time.monotonic() - started, "example": example}
    storage.write_bytes(f"{folder}/demo.json", strict_json.dumps(report, indent=1).encode())
    logs.clear()
    say = partial(print, file=terminal.out())
    say("\n" + table)
    say("\n" + verdict(rows[-1], rows[-2]))
    for label, result in results.items():
        for split, metrics in result["evaluation"].items():
            if (found := no_better_than_the_mean(metrics)) is not None:
                say(f"{label} on {split}: {found}")
    say(f"\nOne user's candidates, scored by the exported model ({example['history']} behaviours of history):")
    for title, probability, label in example["candidates"]:
        say(f"  {probability:.3f}  {'liked    ' if label else 'not liked'}  {title}")
    say(f"\nWhat {example['candidates'][0][0]} was scored by, of the user's past (share of its attention to sinks):")
    for title, feedback, share in example["nearest"]:
        say(f"  {share:6.1%}  rated {feedback:g}  {title}")
    say(f"\nseed {sink.seed}, {report['seconds']:.0f} s in all")
    for name, place in [("runs", folder), ("export", export), ("figures", figures), ("requests", f"{folder}/requests.jsonl")]:
        say(f"{name + ':':10}{place}")
    say(f"\nAll that CTR-Sink's run left, on one page for a browser: {page}")


def get_ready(model: str, spec: RunSpec) -> None:
    """Model, log and prepared shards, where they are not there yet."""
    assert spec.prepare is not None
    if model == "smollm2":
        from ctrsink.prepare.pretrained import get_pretrained

        assert isinstance(spec.model, DecoderSpec)
        assert spec.model.backbone.path is not None
        get_pretrained("smollm2-135m", spec.model.backbone.path)
    download("movielens-100k", spec.prepare.source.path)
    prepare(spec.prepare, spec.data.uri, overwrite=True)


def floor_of(dataset: Dataset, split: str, run_dir: str) -> dict[str, float]:
    """Metrics of the smoothed item mean on the impressions that the models were measured on."""
    table = pq.read_table(io.BytesIO(storage.read_bytes(f"{run_dir}/evaluation/{split}.parquet")))
    measured = set(zip(table["user"].to_pylist(), table["event"].to_pylist(), strict=True))
    means = smoothed_item_mean(dataset, split)
    names = [shard.users[row] for shard, row in map(dataset.locate, means.users.tolist())]
    chosen = np.array([pair in measured for pair in zip(names, means.events.tolist(), strict=True)])
    return all_metrics(means.labels[chosen], means.probabilities[chosen], means.users[chosen])


def row_of(label: str, evaluation: dict[str, dict[str, float]], result: dict[str, Any] | None) -> dict[str, Any]:
    """A row of the demo's table."""
    row: dict[str, Any] = {"model": label}
    for split in ("valid", "test"):
        row |= {f"{split} {metric}": evaluation[split][metric] for metric in ("auc", "gauc", "logloss")}
    if result is not None:
        row |= {
            "impressions": result["impressions"],
            "impressions/s": result["impressions"] / result["seconds"],
            "seconds": result["seconds"],
        }
    return row


def verdict(sinks: dict[str, Any], plain: dict[str, Any]) -> str:
    """One line: what sinks brought over the same language model, whose targets are told the same."""
    parts = [f"{sinks[f'test {m}'] - plain[f'test {m}']:+.4f} {name}" for m, name in (("auc", "AUC"), ("gauc", "GAUC"))]
    return (
        f"On test CTR-Sink has {' and '.join(parts)} against LM-CTR, which is told the same of targets; one seed proves nothing."
    )


def as_table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned columns; the last row has all of them."""
    columns = list(rows[-1])
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    lines = aligned(cells).split("\n")
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if value < 10 else f"{value:.0f}"
    return str(value)


def score_one_user(dataset: Dataset, model: str, folder: str, count: int = 8) -> dict[str, Any]:
    """Candidates of the first user with both answers in the test range, scored by `ctrsink score` in a process of its own."""
    items = dataset.read_items()
    for user in range(len(dataset.index["row"])):
        lo, hi = dataset.events("test", user)
        shard, row = dataset.locate(user)
        chosen = np.arange(lo, min(hi, lo + count))
        labels = shard.chronology(row).labels[chosen]
        if lo >= 10 and len(chosen) == count and 0 < (labels > 0).sum() < count:
            break
    else:
        raise RunError("the data set has no user with enough test impressions to show")
    rows = shard.items[shard.offsets[row] : shard.offsets[row + 1]][chosen].tolist()
    request = request_of(dataset, user, int(lo), rows)
    source, output = f"{folder}/requests.jsonl", f"{folder}/scores.jsonl"
    storage.write_bytes(source, (json.dumps(request) + "\n").encode())
    verb = [sys.executable, "-m", "ctrsink", "score", "--model", model, "--input", source, "--output", output]
    if subprocess.run(verb, check=False, stdout=terminal.out(), stderr=terminal.err()).returncode:
        raise RunError(f"{' '.join(verb)} failed")
    probabilities = json.loads(storage.read_bytes(output))["probabilities"]
    titles = items["title"].to_pylist()
    best = int(np.argmax(probabilities))
    past = sorted(request["history"], key=lambda b: b["timestamp"])
    found = Scorer.load(model).nearest(request, best)
    nearest = [(past[number]["item"]["title"], past[number]["feedback"], share) for number, share in found]
    candidates = sorted(
        ((titles[r], p, int(label)) for r, p, label in zip(rows, probabilities, labels, strict=True)), key=lambda c: -c[1]
    )
    return {"user": shard.users[row], "history": len(request["history"]), "candidates": candidates, "nearest": nearest}


if __name__ == "__main__":
    sys.exit(main())
