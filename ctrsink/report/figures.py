"""Figures of runs side by side: how the training loss fell, and how well the predicted probabilities hold."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ctrsink import storage
from ctrsink.dataset.arrow import from_parquet
from ctrsink.evaluate.metrics import auc, no_better_than_the_mean, normalised_entropy
from ctrsink.report.drawing import COLOURS, draw_figures, wrapped
from ctrsink.train.observe.telemetry import read_metrics

Rows = list[dict[str, Any]]
"""Of a run's metrics.jsonl."""


def compare_runs(run_dirs: dict[str, str], to: str, split: str = "test") -> str:
    """Draw the runs (folder by label) into the PNG file `to`: training loss over sequences, and calibration on `split`."""
    path = Path(to)
    draw_figures({path.stem: partial(_runs, run_dirs=run_dirs, split=split)}, str(path.parent))
    return to


def _runs(figure: Any, run_dirs: dict[str, str], split: str) -> None:
    figure.set_size_inches(11, 4.2)
    left, right = figure.subplots(1, 2)
    predictions = {label: _predictions(run_dir, split) for label, run_dir in run_dirs.items()}
    losses(left, {label: read_metrics(run_dir) for label, run_dir in run_dirs.items()})
    calibration(right, predictions)
    left.set_title("Training")
    right.set_title(f"Calibration, {split} range, deciles")
    for axes in (left, right):
        axes.legend(frameon=False)


def losses(axes: Any, runs: dict[str, Rows], key: str = "loss") -> None:
    """A figure of a training step over the sequences trained on, by run, with the borders of the stages.

    Args:
        key: of the rows; those without it are left out.
    """
    for number, (label, rows) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        told = [row for row in rows if row.get(key) is not None]
        marker = "o" if len(told) < 30 else None
        axes.plot(
            [r["position"] for r in told],
            [r[key] for r in told],
            label=label,
            color=colour,
            linewidth=1.6,
            marker=marker,
            markersize=3,
        )
        for before, after in pairwise(rows):
            if before["stage"] != after["stage"]:
                axes.axvline(before["position"], color=colour, linewidth=0.8, linestyle=":")
                place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "xytext": (3, -2), "va": "top"}
                axes.annotate(f"stage {after['stage']}", (before["position"], 1), color=colour, fontsize=8, **place)
    axes.set(xlabel="sequences trained on", ylabel="log loss of the training batch")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def calibration(axes: Any, predictions: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Predicted and observed shares of positives, by tenths of the predictions.

    Args:
        predictions: labels and probabilities, each [N], by label of the run.
    """
    for number, (label, (labels, probabilities)) in enumerate(predictions.items()):
        parts = [part for part in np.array_split(np.argsort(probabilities), 10) if len(part)]
        predicted, observed = [probabilities[p].mean() for p in parts], [labels[p].mean() for p in parts]
        worth = no_better_than_the_mean({"normalised_entropy": normalised_entropy(labels, probabilities)})
        told = f"{wrapped(label)}, AUC {auc(labels, probabilities):.4f}" + ("" if worth is None else ",\nno better than the mean")
        axes.plot(predicted, observed, marker="o", color=COLOURS[number % len(COLOURS)], label=told)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="predicted probability", ylabel="share of positives", xlim=(0, 1), ylim=(0, 1))


def _predictions(run_dir: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    content = storage.read_bytes(storage.join(run_dir, "evaluation", f"{split}.parquet"))
    table = from_parquet(content)
    return table["label"].to_numpy(), table["probability"].to_numpy()
