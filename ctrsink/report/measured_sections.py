"""What a report says of predictions: reliability, slices, the comparison of variants."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ctrsink.report.comparison import HOW_METRICS_ARE_DRAWN, TITLES, metric_panel, slice_height, slice_panel
from ctrsink.report.figures import calibration
from ctrsink.report.page import SIZE, Figure, Note, Part, Section, Table
from ctrsink.report.run_sections import METRICS_LEAD, interval, number

Predictions = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Labels and probabilities, each [N], by what they are called."""
SLICES: dict[str, str] = {
    "history": "Length of the history: behaviours before the impression.",
    "popularity": "Popularity of the item: its events in the train split.",
    "popularity decile": "Popularity of the item, by tenths of the impressions.",
    "user": "Users who have impressions in the train split, and new ones.",
    "item": "Items that are in the train split, and new ones.",
    "day": "Day (UTC).",
}


def reliability_section(predictions: Predictions, missing: Mapping[str, str]) -> Section:
    """How often what was predicted came true, a figure for each."""
    parts: list[Part] = [Figure(f"Reliability: {name}.", partial(_one, name=name, own=own)) for name, own in predictions.items()]
    parts += [Note(why, missing=True) for why in missing.values()]
    return Section("Reliability", parts, "By tenths of the predictions; on the dashed line as many came true as were predicted.")


def _one(figure: Any, name: str, own: tuple[np.ndarray, np.ndarray]) -> None:
    axes = figure.subplots()
    calibration(axes, {name: own})
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def slices_section(found: dict[str, Any]) -> Section:
    """AUC by groups of the impressions, of one run or of variants against their baseline."""
    if not found["slices"]:
        return Section("Slices", [Note(f"There are none: {found.get('slices_left_out', 'no impression')}", missing=True)])
    others = [name for name in found["variants"] if name != found["baseline"]]
    parts: list[Part] = []
    for title in found["slices"]:
        size = (SIZE[0], slice_height(found, title))
        parts.append(
            Figure(
                _called(title),
                partial(_slice, found=found, title=title, named=len(others) > 1),
                size,
            )
        )
    for title, groups in found["slices"].items():
        rows = []
        for name, group in groups.items():
            own = group["variants"]
            base = own[found["baseline"]]["metrics"]["auc"]
            apart = [own[other]["difference"]["auc"] for other in others]
            cells = [_with_interval(base), *[_with_interval(each, "+") for each in apart]]
            rows.append((name, f"{group['impressions']:,}", f"{group['users']:,}", *cells))
        rest = [f"{other} less {found['baseline']}" for other in others]
        parts.append(
            Table((title, "impressions", "users", f"AUC of {found['baseline']}", *rest), rows, folded=f"By {title}, in numbers")
        )
    return Section(
        "Slices", parts, f"On {found['split']}; bars are intervals of 95 % by users, in brackets the number of impressions."
    )


def _called(title: str) -> str:
    return SLICES.get(title) or title


def _slice(figure: Any, found: dict[str, Any], title: str, named: bool) -> None:
    axes = figure.subplots()
    slice_panel(axes, found, title)
    if named:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=8, ncols=2)


def comparison_section(found: dict[str, Any]) -> Section:
    """Every variant's metrics and differences to the baseline, with both intervals, and what each was trained on."""
    size = (SIZE[0], 1.0 + 0.34 * len(found["variants"]))
    parts: list[Part] = [Figure(f"{TITLES[metric]}: {HOW_METRICS_ARE_DRAWN}.", partial(_metric, found=found, metric=metric), size)
                         for metric in TITLES]  # fmt: skip
    head = ("", "mean", "by users", "by seeds", f"less {found['baseline']}", "by users", "by seeds")
    for metric, title in TITLES.items():
        rows = []
        for name, variant in found["variants"].items():
            own, apart = variant["metrics"][metric], variant.get("difference", {}).get(metric)
            difference = ("", "", "") if apart is None else (f"{apart['mean']:+.4f}", *_both(apart, "+"))
            rows.append((name, number(own["mean"]), *_both(own), *difference))
        parts.append(Table(head, rows, caption=title))
    trained = [
        (name, str(len(variant["runs"])), *[_or_dash(variant["trained"][key], each) for key, each in _TRAINED.items()])
        for name, variant in found["variants"].items()
    ]
    parts.append(Table(("trained on", "seeds", "impressions", "steps", "seconds", "TFLOP"), trained))
    if found["equal_budget"] is not True:
        told = "differ" if found["equal_budget"] is False else "are not known of every run"
        parts.append(Note(f"The budgets {told}: variants perhaps trained on unequally many impressions.", warning=True))
    lead = (
        f"{found['split']}: {found['impressions']:,} impressions of {found['users']:,} users. A difference whose interval "
        f"holds 0 is not shown to be one. {METRICS_LEAD} By seeds: Student's t."
    )
    return Section("Comparison", parts, lead)


_TRAINED = {"impressions": ",.0f", "steps": ",.0f", "seconds": ",.0f", "flops": ",.3g"}


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value / 1e12 if form == ",.3g" else value, form)


def _metric(figure: Any, found: dict[str, Any], metric: str) -> None:
    metric_panel(figure.subplots(), found, metric)


def _both(found: dict[str, Any], sign: str = "") -> tuple[str, str]:
    return interval(found["by_users"], sign), interval(found["by_seeds"], sign)


def _with_interval(found: dict[str, Any], sign: str = "") -> str:
    if math.isnan(found["mean"]):
        return "-"
    told = f"{found['mean']:{sign}.4f}"
    return told if found["by_users"] is None else f"{told} ({interval(found['by_users'], sign)})"
