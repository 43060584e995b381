"""A comparison of runs (ctrsink.studies.compare) for people: as text, and as figures."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ctrsink.report.drawing import BLUE, COLOURS, ORANGE, draw_figures, wrapped
from ctrsink.text_table import aligned

MARKERS = "os^D"
TITLES = {"auc": "AUC", "gauc": "GAUC", "logloss": "log loss"}


def as_table(found: dict[str, Any]) -> str:
    """Every metric with its intervals, what was trained, and AUC by slices."""
    head = (
        f"{found['split']}: {found['impressions']:,} impressions of {found['users']:,} users, {found['positives']:,} positive; "
        f"differences to {found['baseline']}; intervals of 95 %"
    )
    tables = [head, *(_metric(found, metric) for metric in TITLES), _trained(found)]
    tables += [_slice(found, title) for title in found["slices"]]
    if "slices_left_out" in found:
        tables.append(f"slices are left out: {found['slices_left_out']}")
    return "\n\n".join(tables)


def _metric(found: dict[str, Any], metric: str) -> str:
    rows: list[Sequence[str]] = [
        (TITLES[metric], "mean", "deviation", "by users", "by seeds", "difference", "by users", "by seeds")
    ]
    for name, variant in found["variants"].items():
        own, difference = variant["metrics"][metric], variant.get("difference", {}).get(metric)
        apart = ("", "", "") if difference is None else _difference(difference)
        rows.append(
            (name, _number(own["mean"]), _number(own["deviation"]), _range(own["by_users"]), _range(own["by_seeds"]), *apart)
        )
    return aligned(rows)


def _difference(difference: dict[str, Any]) -> tuple[str, str, str]:
    return f"{difference['mean']:+.4f}", _range(difference["by_users"], "+"), _range(difference["by_seeds"], "+")


def _trained(found: dict[str, Any]) -> str:
    rows: list[Sequence[str]] = [("trained on", "seeds", "impressions", "steps", "seconds", "TFLOP")]
    for name, variant in found["variants"].items():
        trained = variant["trained"]
        told = [trained[key] for key in ("impressions", "steps", "seconds")]
        flops = "-" if trained["flops"] is None else f"{trained['flops'] / 1e12:,.3g}"
        rows.append((name, str(len(variant["runs"])), *("-" if value is None else f"{value:,.0f}" for value in told), flops))
    equal = {
        True: "all runs trained on equally many impressions",
        False: "the budgets are NOT equal",
        None: "whether the budgets are equal is not known",
    }[found["equal_budget"]]
    return f"{aligned(rows)}\n{equal}; seconds and FLOPs are those of training"


def _slice(found: dict[str, Any], title: str) -> str:
    """AUC of the baseline, and what the others have beyond it."""
    others = [name for name in found["variants"] if name != found["baseline"]]
    rows = [(f"AUC by {title}", "impressions", "users", found["baseline"], *others)]
    for name, group in found["slices"][title].items():
        own = group["variants"]
        base = _number(own[found["baseline"]]["metrics"]["auc"]["mean"])
        apart = [own[other]["difference"]["auc"] for other in others]
        cells = [f"{_number(each['mean'], '+')} [{_range(each['by_users'], '+')}]" for each in apart]
        rows.append((name, f"{group['impressions']:,}", f"{group['users']:,}", base, *cells))
    return aligned(rows)


def _number(value: float, sign: str = "") -> str:
    return "-" if np.isnan(value) else f"{value:{sign}.4f}"


def _range(interval: tuple[float, float] | None, sign: str = "") -> str:
    return "-" if interval is None else f"{interval[0]:{sign}.4f} to {interval[1]:{sign}.4f}"


def draw_comparison(found: dict[str, Any], to: str) -> list[str]:
    """Draw differences, and AUC by slices, into the local folder `to`; returns the files; see draw_figures for what is raised."""
    drawings = {"metrics": partial(_metrics, found=found)}
    if found["slices"]:
        drawings["slices"] = partial(_slices, found=found)
    return draw_figures(drawings, to)


def _metrics(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(12, 1.6 + 0.5 * len(found["variants"]))
    for axes, metric in zip(figure.subplots(1, len(TITLES), sharey=True), TITLES, strict=True):
        metric_panel(axes, found, metric)
    figure.suptitle(f"{found['split']}: {HOW_METRICS_ARE_DRAWN}")


HOW_METRICS_ARE_DRAWN = "mean over seeds with 95 % by users; every run (orange)"


def metric_panel(axes: Any, found: dict[str, Any], metric: str) -> None:
    """The mean of every variant and its interval by users, below it each run; the baseline's mean as a line."""
    names = list(found["variants"])
    for row, name in enumerate(names):
        own = found["variants"][name]["metrics"][metric]
        if own["by_users"] is not None:
            axes.plot(own["by_users"], [row, row], color=BLUE, linewidth=1.6)
        axes.plot(own["mean"], row, "o", color=BLUE, markersize=6)
        axes.plot(own["runs"], np.full(len(own["runs"]), row + 0.22), "|", color=ORANGE, markersize=7)
    axes.axvline(found["variants"][found["baseline"]]["metrics"][metric]["mean"], color="grey", linewidth=0.8, linestyle="--")
    axes.set_yticks(np.arange(len(names)), list(map(wrapped, names)))
    axes.locator_params(axis="x", nbins=5)
    axes.set(xlabel=TITLES[metric], ylim=(len(names) - 0.4, -0.6))


def _slices(figure: Any, found: dict[str, Any]) -> None:
    titles = list(found["slices"])
    rows = -(-len(titles) // 2)
    figure.set_size_inches(12, rows * max(slice_height(found, title) for title in titles))
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, title in zip(panels, titles, strict=False):
        slice_panel(axes, found, title)
        axes.set_title(title)
    for axes in panels[len(titles) :]:
        axes.set_axis_off()
    panels[0].legend(frameon=False, fontsize=8)


def slice_height(found: dict[str, Any], title: str) -> float:
    """Inches that a panel of a slice takes to be legible."""
    return 1.1 + len(found["slices"][title]) * max(0.3, 0.13 * len(found["variants"]))


def slice_panel(axes: Any, found: dict[str, Any], title: str) -> None:
    """The difference in AUC to the baseline by the groups of a slice; without another variant, the AUC itself."""
    groups = found["slices"][title]
    others = [name for name in found["variants"] if name != found["baseline"]]
    for place, name in enumerate(others or [found["baseline"]]):
        shown = [group["variants"][name]["difference" if others else "metrics"]["auc"] for group in groups.values()]
        at = np.arange(len(groups)) + (place + 0.5) / max(1, len(others)) * 0.6 - 0.3
        colour = COLOURS[place % len(COLOURS)]
        marker = MARKERS[place // len(COLOURS) % len(MARKERS)]  # where colours begin anew
        axes.plot([each["mean"] for each in shown], at, marker, color=colour, markersize=4, label=wrapped(name))
        for y, each in zip(at, shown, strict=True):
            if each["by_users"] is not None:
                axes.plot(each["by_users"], [y, y], color=colour, linewidth=1.4)
    if others:
        axes.axvline(0, color="grey", linewidth=0.8, linestyle="--")
    axes.set_yticks(np.arange(len(groups)), [f"{name} ({group['impressions']:,})" for name, group in groups.items()], fontsize=8)
    axes.locator_params(axis="x", nbins=5)
    label = wrapped(f"AUC less that of {found['baseline']}", 36) if others else "AUC"
    axes.set(xlabel=label, ylim=(len(groups) - 0.5, -0.5))
