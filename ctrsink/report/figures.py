"""Figures of runs side by side: how the training loss fell, and how well the predicted probabilities hold."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen on a cluster

import matplotlib.pyplot as plt
import numpy as np

from ctrsink import storage
from ctrsink.dataset.arrow import from_parquet
from ctrsink.evaluate.metrics import auc, no_better_than_the_mean, normalised_entropy
from ctrsink.train.observe.telemetry import read_metrics


def compare_runs(run_dirs: dict[str, str], to: str, split: str = "test") -> str:
    """Draw the runs (folder by label) into the PNG file `to`: training loss over sequences, and calibration on `split`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for label, run_dir in run_dirs.items():
        rows = read_metrics(run_dir)
        (line,) = left.plot([r["position"] for r in rows], [r["loss"] for r in rows], label=label, linewidth=1.6)
        _mark_stages(left, rows, line.get_color())
        labels, probabilities = _predictions(run_dir, split)
        parts = np.array_split(np.argsort(probabilities), 10)
        predicted, observed = [probabilities[p].mean() for p in parts], [labels[p].mean() for p in parts]
        worth = no_better_than_the_mean({"normalised_entropy": normalised_entropy(labels, probabilities)})
        told = f"{label}, AUC {auc(labels, probabilities):.4f}{'' if worth is None else ', no better than the mean'}"
        right.plot(predicted, observed, marker="o", color=line.get_color(), label=told)
    left.set(xlabel="sequences trained on", ylabel="log loss of the training batch", title="Training")
    right.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
    right.set(
        xlabel="predicted probability",
        ylabel="share of positives",
        title=f"Calibration, {split} range, deciles",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    left.legend(frameon=False)
    right.legend(frameon=False)
    path = Path(to)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return to


def _mark_stages(axes: Any, rows: list[dict[str, Any]], color: Any) -> None:
    for before, after in pairwise(rows):
        if before["stage"] != after["stage"]:
            axes.axvline(before["position"], color=color, linewidth=0.8, linestyle=":")
            axes.annotate(f"stage {after['stage']}", (before["position"], axes.get_ylim()[1]), color=color, fontsize=8, va="top")


def _predictions(run_dir: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    content = storage.read_bytes(storage.join(run_dir, "evaluation", f"{split}.parquet"))
    table = from_parquet(content)
    return table["label"].to_numpy(), table["probability"].to_numpy()
