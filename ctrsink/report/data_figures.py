"""Figures of a prepared data set: history lengths, events and label rate over time, popularity, tokens of an item."""

from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np

from ctrsink.dataset.inspect import DAY, HISTORIES, Inspection
from ctrsink.report.drawing import BLUE, ORANGE, draw_figures

POINTS = 120
"""Points of time in a figure, at most: a log of years is drawn by weeks or months."""


def draw_data(found: Inspection, to: str) -> list[str]:
    """Draw each figure as a PNG file into the local folder `to`; returns the files; see draw_figures for what is raised."""
    return draw_figures({name: partial(draw, found=found) for name, draw in DRAWINGS.items()}, to)


def _history_lengths(figure: Any, found: Inspection) -> None:
    """How many targets a value of data.history serves in full."""
    axes, counts = figure.subplots(), found.behaviours.of
    reached = np.cumsum(counts) / max(1, counts.sum())
    axes.step(np.arange(len(reached)) + 1, reached, where="post", color=BLUE, linewidth=1.8)  # from 1 on: the axis is logarithmic
    for history in HISTORIES:
        if history < len(reached):
            axes.plot(history + 1, reached[history], "o", color=ORANGE)
            place = {"textcoords": "offset points", "xytext": (7, -11), "color": ORANGE}
            axes.annotate(f"{history}: {reached[history]:.0%}", (history + 1, reached[history]), **place)
    ticks = [n for n in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 100_000) if n < 1.2 * len(reached)]
    axes.set_xscale("log")
    axes.set_xticks([n + 1 for n in ticks], [f"{n:,}" for n in ticks])
    axes.set_xticks([], minor=True)
    axes.set(
        ylim=(0, 1.02), xlabel="behaviours before the target", ylabel="share of targets with at most as many",
        title=f"How much history the {found.behaviours.of.sum():,} targets have",
    )  # fmt: skip
    axes.yaxis.set_major_formatter(_percent)


def _over_time(figure: Any, found: Inspection) -> None:
    """Events of a day, and below them the share of clicks, with the borders of the newest part's splits."""
    from matplotlib.dates import ConciseDateFormatter

    above, below = figure.subplots(2, 1, sharex=True)
    width = -(-found.days.shape[1] // POINTS)
    edges = np.arange(0, found.days.shape[1], width)
    days = np.minimum(width, found.days.shape[1] - edges)
    events, impressions, positives = np.add.reduceat(found.days, edges, axis=1)
    at = [datetime.fromtimestamp(DAY * (found.first_day + edge + n / 2), UTC) for edge, n in zip(edges, days, strict=True)]
    above.bar(at, events / days, width=0.9 * days, color=BLUE)
    above.set(ylabel="events a day", title="Events and label rate over time" + ("" if width == 1 else f", by {width} days"))
    above.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    # A rate of few impressions is chance, and would set the scale for all.
    enough = impressions >= max(1.0, np.median(impressions[impressions > 0]) / 10)
    rate = np.divide(positives, impressions, out=np.full(len(edges), np.nan), where=enough)
    below.plot(at, rate, color=BLUE, linewidth=1.4, marker="o", markersize=3)
    rare = "" if (enough | (impressions == 0)).all() else ", without points of very few impressions"
    below.set(ylabel="positive impressions", xlabel=f"time (UTC){rare}", ylim=(0, min(1.0, 1.6 * np.nanmax(rate)) or 1.0))
    below.yaxis.set_major_formatter(_percent)
    below.xaxis.set_major_formatter(ConciseDateFormatter(below.xaxis.get_major_locator()))
    times, last = found.manifest.split_times, found.manifest.parts[-1].last_time
    for number, (name, time) in enumerate((("valid", times.train_end), ("test", times.valid_end))):
        if time > last:
            continue  # that split is empty
        for axes in (above, below):
            axes.axvline(datetime.fromtimestamp(time, UTC), color=ORANGE, linewidth=1.2, linestyle="--")
        place = {
            "xycoords": ("data", "axes fraction"),
            "textcoords": "offset points",
            "xytext": (4, -2 - 11 * number),
            "va": "top",
        }
        below.annotate(f"{name} →", (datetime.fromtimestamp(time, UTC), 1), color=ORANGE, **place)


def _popularity(figure: Any, found: Inspection) -> None:
    """Events of an item by its rank: a straight line is a power law."""
    axes = figure.subplots()
    popular = np.sort(found.item_events[found.item_events > 0])[::-1]
    ranks = np.arange(1, len(popular) + 1)
    # As many points as can be told apart on a logarithmic axis.
    chosen = np.unique(np.geomspace(1, len(popular), 600).round().astype(np.int64)) - 1
    axes.plot(ranks[chosen], popular[chosen], color=BLUE, linewidth=1.8)
    for percent, height in ((1, 0.2), (10, 0.04)):
        rank = max(1, round(len(found.item_events) * percent / 100))
        if 1 < rank < len(popular):
            axes.axvline(rank, color=ORANGE, linewidth=1.0, linestyle="--")
            text = f"top {percent}% of items:\n{popular[:rank].sum() / popular.sum():.0%} of events"
            place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "right", "color": ORANGE}
            axes.annotate(text, (rank, height), (-5, 0), **place)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlabel="rank of the item", ylabel="events of the item", title="Popularity of items")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_minor_formatter("")


def _item_tokens(figure: Any, found: Inspection) -> None:
    """How long items' texts are, and whether prepare.text.max_item_tokens cuts many of them."""
    axes = figure.subplots()
    counts = np.bincount(found.item_tokens[found.item_tokens >= 0])
    limit = found.manifest.text.max_item_tokens
    axes.bar(np.arange(len(counts)), counts, color=BLUE, width=0.85)
    cut = int(counts[limit]) if limit < len(counts) else 0
    what = f"{cut:,} items reach the limit of {limit}" if cut else f"none reaches the limit of {limit}"
    axes.set(xlabel="tokens of the item's text", ylabel="items", title=f"Tokens of an item: {what}")
    axes.set_xlim(left=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _percent(value: float, _: int) -> str:
    return f"{value:.0%}"


DRAWINGS = {"history_lengths": _history_lengths, "over_time": _over_time, "popularity": _popularity, "item_tokens": _item_tokens}
"""By name, what fills a figure with what was found."""
