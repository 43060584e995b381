"""What a report says of one run's training: its result, losses by stage, pace and time, configuration."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from ctrsink.config import RunSpec, dump_run
from ctrsink.evaluate.metrics import no_better_than_the_mean
from ctrsink.report.figures import Rows, losses
from ctrsink.report.pace import RATES, draw_rate, draw_time, mean_rates, most_memory, time_spent
from ctrsink.report.page import SIZE, Figure, Listing, Note, Part, Section, Table

METRICS = {
    "auc": "AUC", "gauc": "GAUC", "uauc": "UAUC", "logloss": "log loss", "normalised_entropy": "normalised entropy",
    "calibration_error": "calibration error",
}  # fmt: skip
METRICS_LEAD = (
    "Intervals of 95 % over 1,000 draws of users. GAUC is the mean AUC of users by their impressions, UAUC by user; normalised "
    "entropy below 1 is better than always predicting the mean click rate."
)
Evaluations = Mapping[str, Mapping[str, float | None]]
"""By split, what evaluation/<split>.json holds."""


def metrics_section(evaluations: Evaluations, comparisons: Mapping[str, dict[str, Any]], missing: Mapping[str, str]) -> Section:
    """Every metric of the splits that were measured.

    Args:
        comparisons: what `ctrsink.studies.compare` found of the run alone, by split: the intervals.
        missing: why a split, or its intervals, are not there, by split.
    """
    parts: list[Part] = []
    for split, found in evaluations.items():
        between: dict[str, Any] = {}
        if split in comparisons:
            (variant,) = comparisons[split]["variants"].values()
            between = {key: own["by_users"] for key, own in variant["metrics"].items()}
        rows = [(name, number(found.get(key)), interval(between.get(key), missing="")) for key, name in METRICS.items()]
        counts = [("impressions", "impressions"), ("users", "users with both classes")]
        rows += [(name, f"{found[key]:,.0f}", "") for key, name in counts if found.get(key) is not None]
        parts.append(Table(("", split, "by users"), rows))
    for split, found in evaluations.items():
        if (told := no_better_than_the_mean({"normalised_entropy": found.get("normalised_entropy")})) is not None:
            parts.append(Note(f"On {split} the model is {told}.", warning=True))
    parts += [Note(why, missing=True) for why in missing.values()]
    return Section("Metrics", parts, METRICS_LEAD)


def training_section(spec: RunSpec, rows: Rows) -> Section:
    """The loss over the sequences, and a table of the stages; where there was validation, its AUC."""
    if not rows:
        return Section("Loss by stage", [Note("The run has not made a step, or its metrics.jsonl is gone.", missing=True)])
    parts: list[Part] = []
    for stage in spec.stages:
        own = [row for row in rows if row["stage"] == stage.name]
        if own:
            what = "log loss" if stage.objective == "click" else f"loss of the objective {stage.objective}"
            parts.append(Figure(f"Stage {stage.name}: {what} of the training batch.", partial(_loss, rows=own, what=what)))
    validated = [row for row in rows if row.get("valid/auc") is not None]
    if validated:
        parts.append(Figure("AUC on the validation sample.", partial(_validation, rows=rows)))
    elif spec.train.validation is None:
        parts.append(Note("Nothing was measured while it trained: train.validation is null."))
    head = ("stage", "objective", "trains", "steps", "sequences", "first loss", "last loss")
    told = [_stage(stage.name, stage.objective, stage.trainable, rows) for stage in spec.stages]
    parts.append(Table(head, told, left=3))
    return Section("Loss by stage", parts, "A point is one batch, every train.log_every steps: it is noisy.")


def _loss(figure: Any, rows: Rows, what: str) -> None:
    axes = figure.subplots()
    losses(axes, {"": rows})
    axes.set_ylabel(what)


def _validation(figure: Any, rows: Rows) -> None:
    axes = figure.subplots()
    losses(axes, {"": rows}, "valid/auc")
    axes.set_ylabel("AUC, validation sample")


def _stage(name: str, objective: str, trainable: Any, rows: Rows) -> tuple[str, ...]:
    numbers = [at for at, row in enumerate(rows) if row["stage"] == name]
    if not numbers:
        return (name, objective, ", ".join(trainable), "not begun", "", "", "")
    before = rows[numbers[0] - 1] if numbers[0] else {"step": 0, "position": 0}
    first, last = rows[numbers[0]], rows[numbers[-1]]
    steps, sequences = last["step"] - before["step"], last["position"] - before["position"]
    return name, objective, ", ".join(trainable), f"{steps:,}", f"{sequences:,}", number(first["loss"]), number(last["loss"])


def pace_section(rows: Rows, result: dict[str, Any]) -> Section:
    """Throughput over the steps, and where the time went."""
    rates, spent = mean_rates(rows, result), time_spent(rows, result)
    if not rates or not spent:
        return Section("Throughput and time", [Note("The run has told of no step yet: there is nothing to time.", missing=True)])
    whole = sum(spent.values())
    parts: list[Part] = [
        Figure(f"{RATES[key]}, all ranks together.", partial(draw_rate, rows=rows, key=key))
        for key in ("impressions_per_s", "tokens_per_s")
        if key in rates
    ]
    parts.append(Figure("Where the time of training went.", partial(draw_time, runs=[("", spent)]), (SIZE[0], 2.0)))
    parts.append(Table(("time", "seconds", "share"), [(name, f"{s:,.1f}", f"{s / whole:.1%}") for name, s in spent.items()]))
    told = [(RATES[key], f"{value:,.4g}" if value < 1000 else f"{value:,.0f}") for key, value in rates.items()]
    if result.get("flops") is not None:
        told.append(("TFLOP in all", f"{result['flops'] / 1e12:,.4g}"))
    names = {"memory_gib": "GiB of a process, at most", "gpu_memory_gib": "GiB of a GPU, at most"}
    told += [(names[key], f"{value:.2f}") for key, value in most_memory(rows).items()]
    parts.append(Table(("mean over time", ""), told))
    if "mfu" not in rates:
        parts.append(
            Note("There is no share of the device's peak (MFU): it is not known of this device; runtime.peak_tflops names it.")
        )
    return Section("Throughput and time", parts, "Evaluation after training is not part of it.")


def configuration_section(spec: RunSpec) -> Section:
    """The resolved configuration."""
    return Section("Configuration", [Listing("Every key, as resolved", dump_run(spec))])


def number(value: float | None) -> str:
    """Four decimals, or a dash where there is no number."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def interval(found: tuple[float, float] | None, sign: str = "", missing: str = "-") -> str:
    """From where to where."""
    return missing if found is None else f"{found[0]:{sign}.4f} to {found[1]:{sign}.4f}"
