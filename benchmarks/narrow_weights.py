"""What `train.weights: bf16` changes: loss by loss beside fp32 weights.

The same run of a tiny Llama, all of it trained in `train.precision: bf16`, on a made-up log: with fp32 weights, and with bf16
weights under ZeRO 2 and 3.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import machine, machine_line, markdown
from ctrsink import strict_json

GROUPS = ["sink", "bias", "head", "backbone"]
CASES: dict[str, dict[str, Any]] = {
    "fp32, ZeRO 2": {"weights": "fp32", "zero_stage": 2},
    "bf16, ZeRO 2": {"weights": "bf16", "zero_stage": 2},
    "bf16, ZeRO 3": {"weights": "bf16", "zero_stage": 3},
}


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.narrow_weights", description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of each run (default: 200)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = {"machine": machine(), "steps": args.steps, "rows": run(Path(folder), args.steps)}
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def run(work: Path, steps: int) -> list[dict[str, Any]]:
    """A row for each case; differences are to the first one."""
    from ctrsink.prepare.build import prepare
    from ctrsink.prepare.synth import synth
    from ctrsink.runtime.start import start
    from ctrsink.train.observe.telemetry import read_metrics

    synth(str(work / "raw"), 10_000, 400, 200, 0, "csv")
    first = spec_of(work, "data", steps)
    prepare(first.prepare, first.data.uri)
    rows: list[dict[str, Any]] = []
    wide = np.empty(0)
    for name, train in CASES.items():
        spec = spec_of(work, name, steps, train=train)
        result = start(spec)
        losses = np.array([row["loss"] for row in read_metrics(spec.run_dir)])
        if not rows:
            wide = losses
        apart, auc = np.abs(losses - wide), result["evaluation"]["test"]["auc"]
        last = losses[-steps // 4 :].mean()
        rows.append({"case": name, "last": last, "mean": apart.mean(), "most": apart.max(), "auc": auc})
        print(*rows[-1].values(), file=sys.stderr, flush=True)
    return rows


def spec_of(work: Path, name: str, steps: int, **changes: Any) -> Any:
    """The run of a case."""
    from ctrsink.config import parse_run
    from ctrsink.config.load import merge

    fields = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    tree = {
        "run_dir": str(work / "runs" / name),
        "data": {"uri": str(work / "data"), "examples": "per_user", "history": 8, "targets": 4},
        "prepare": {
            "source": {
                "kind": "table",
                "path": str(work / "raw/events"),
                "items": str(work / "raw/items.csv"),
                "columns": {"user": "user", "item": "item", "timestamp": "timestamp", "feedback": "click", "label": "click"},
            },
            "text": {"item": "{title}, {genre}", "feedback": " {feedback:g}"},
            "tokenizer": {"train_vocabulary": 512},
        },
        "model": {"backbone": {"config": {"model_type": "llama", "max_position_embeddings": 4096} | fields}},
        "stages": [{"name": "all", "trainable": GROUPS, "lr": dict.fromkeys(GROUPS, 1e-3), "steps": steps}],
        "train": {"batch_size": 2, "micro_batch_size": 1, "precision": "bf16", "log_every": 1, "checkpoint_every": 10**6},
        "evaluate": {"splits": ["test"], "max_sequences": 40},
    }
    return parse_run(merge(tree, changes), "narrow_weights")


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    header = ("trained weights", "loss, last quarter", "apart, mean", "apart, most", "test AUC")
    rows = [(row["case"], *(f"{row[key]:.4f}" for key in ("last", "mean", "most", "auc"))) for row in report["rows"]]
    return f"{machine_line(report['machine'])}. {report['steps']} steps.\n\n{markdown(header, rows)}"


if __name__ == "__main__":
    sys.exit(main())
