"""A comparison of runs (ctrsink.studies.compare) for people: as text, and as figures."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ctrsink.report.drawing import BLUE, ORANGE, draw_figures
from ctrsink.text_table import aligned

TITLES = {"auc": "AUC", "gauc": "GAUC", "logloss": "log loss"}
COLOURS = (BLUE, ORANGE, "#3a8f5c", "#8a4fa3", "#8c8c8c", "#b03a48", "#2b9aa8", "#a68a2c")


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
    """The mean of every variant and its interval by users, below it each run."""
    names = list(found["variants"])
    figure.set_size_inches(12, 1.6 + 0.5 * len(names))
    at = np.arange(len(names))
    for axes, metric in zip(figure.subplots(1, len(TITLES), sharey=True), TITLES, strict=True):
        for row, name in enumerate(names):
            own = found["variants"][name]["metrics"][metric]
            if own["by_users"] is not None:
                axes.plot(own["by_users"], [row, row], color=BLUE, linewidth=1.6)
            axes.plot(own["mean"], row, "o", color=BLUE, markersize=6)
            axes.plot(own["runs"], np.full(len(own["runs"]), row + 0.22), "|", color=ORANGE, markersize=7)
        axes.axvline(found["variants"][found["baseline"]]["metrics"][metric]["mean"], color="grey", linewidth=0.8, linestyle="--")
        axes.set_yticks(at, names)
        axes.set(xlabel=TITLES[metric], ylim=(len(names) - 0.4, -0.6))
    figure.suptitle(f"{found['split']}: mean over seeds with 95 % by users; every run (orange)")


def _slices(figure: Any, found: dict[str, Any]) -> None:
    """The difference in AUC to the baseline by slices; without another variant, the AUC itself."""
    others = [name for name in found["variants"] if name != found["baseline"]]
    figure.set_size_inches(12, 3.2 * len(found["slices"]))
    panels = figure.subplots(len(found["slices"]), 1, squeeze=False)[:, 0]
    for axes, (title, groups) in zip(panels, found["slices"].items(), strict=True):
        for place, name in enumerate(others or [found["baseline"]]):
            shown = [group["variants"][name]["difference" if others else "metrics"]["auc"] for group in groups.values()]
            at = np.arange(len(groups)) + (place + 0.5) / max(1, len(others)) * 0.6 - 0.3
            colour = COLOURS[place % len(COLOURS)]
            axes.plot(at, [each["mean"] for each in shown], "o", color=colour, markersize=5, label=name)
            for x, each in zip(at, shown, strict=True):
                if each["by_users"] is not None:
                    axes.plot([x, x], each["by_users"], color=colour, linewidth=1.4)
        if others:
            axes.axhline(0, color="grey", linewidth=0.8, linestyle="--")
        labels = [name.replace(" to ", " to\n") + f"\n{group['impressions']:,}" for name, group in groups.items()]
        axes.set_xticks(np.arange(len(groups)), labels, fontsize=8)
        axes.set(title=title, xlim=(-0.5, len(groups) - 0.5), ylabel=f"AUC less that of {found['baseline']}" if others else "AUC")
    panels[0].legend(frameon=False, fontsize=8, ncols=4)
