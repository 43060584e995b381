"""How fast a run went and where its time went, from the rows of its metrics.jsonl."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ctrsink.report.drawing import COLOURS, wrapped
from ctrsink.report.figures import Rows

RATES = {"impressions_per_s": "impressions/s", "tokens_per_s": "tokens/s", "tflops": "TFLOP/s", "mfu": "MFU"}


def time_spent(rows: Rows, result: dict[str, Any]) -> dict[str, float]:
    """Seconds by what they went to; empty where nothing says so.

    The seconds of the steps are those of result.json, or as many as the rows add up to; what waited for data is its share of the
    rows' time; checkpoints are the time for which training stood still, each counted once.
    """
    spans = _spans(rows, result)
    between = float(spans.sum())
    steps = float(result.get("seconds") or between)
    if not rows or steps <= 0:
        return {}
    wait = min(steps, float(spans @ np.array([row.get("data_wait") or 0.0 for row in rows])))
    stops, last = 0.0, None
    for row in rows:
        if row.get("checkpoint_s") not in (None, last):
            last = row["checkpoint_s"]
            stops += last
    found = {"computing steps": steps - wait, "waiting for data": wait, "standing still for checkpoints": stops}
    rest = between - steps - stops
    if result.get("seconds") and rest > 0.005 * steps:
        found["validation, reports and the rest"] = rest
    return found


def _spans(rows: Rows, result: dict[str, Any]) -> np.ndarray:
    """Seconds that each row's rates are over, [rows]: impressions since the row before it, over their rate.

    Rows tell of sequences; a sequence is taken to hold as many impressions as the run's sequences have in the mean.
    """
    if not rows:
        return np.zeros(0)
    positions = np.array([row["position"] for row in rows], np.float64)
    each = (result.get("impressions") or positions[-1]) / max(1.0, positions[-1])
    rates = np.array([row.get("impressions_per_s") or np.inf for row in rows])
    return np.diff(positions, prepend=0.0) * each / rates


def mean_rates(rows: Rows, result: dict[str, Any]) -> dict[str, float]:
    """Of each of RATES that the rows have, the mean over time."""
    spans = _spans(rows, result)
    if not spans.sum() > 0:
        return {}
    return {
        key: float(np.average([row.get(key) or 0.0 for row in rows], weights=spans))
        for key in RATES
        if any(row.get(key) is not None for row in rows)
    }


def most_memory(rows: Rows) -> dict[str, float]:
    """GiB of the rank with most of it: of the process, and of its GPU."""
    found: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            name = key.partition("/")[0]
            if name in ("memory_gib", "gpu_memory_gib") and value is not None:
                found[name] = max(value, found.get(name, 0.0))
    return found


def draw_rate(figure: Any, rows: Rows, key: str) -> None:
    """One of RATES over the steps."""
    axes = figure.subplots()
    told = [row for row in rows if row.get(key) is not None]
    axes.plot(
        [row["step"] for row in told], [row[key] for row in told], color=COLOURS[0], marker="o", markersize=3, linewidth=1.4
    )
    axes.set(xlabel="optimiser step", ylabel=RATES[key], ylim=(0, None))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}")


def draw_time(figure: Any, runs: Sequence[tuple[str, dict[str, float]]]) -> None:
    """What `time_spent` found, a bar for each run."""
    axes = figure.subplots()
    at, starts = np.arange(len(runs)), np.zeros(len(runs))
    parts = list(dict.fromkeys(part for _, spent in runs for part in spent))
    for number, part in enumerate(parts):
        seconds = np.array([spent.get(part, 0.0) for _, spent in runs])
        axes.barh(at, seconds, left=starts, height=0.6, color=COLOURS[number], label=part)
        starts += seconds
    axes.set_yticks(at, [wrapped(name) for name, _ in runs])
    axes.set(xlabel="seconds", ylim=(len(runs) - 0.4, -0.6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    figure.legend(loc="outside upper left", frameon=False, fontsize=9)
