"""Figures of a look into a run (ctrsink.report.look): attention to sinks by layer and head, and what signals are worth."""

from typing import Any

import numpy as np

from ctrsink.report.drawing import BLUE, INK, ORANGE, PAGE, wrapped


def attention_map(figure: Any, layers: dict[str, list[float]], most: float) -> None:
    """The share of the targets' attention to their history that goes to sinks: a row per layer, a column per head.

    Args:
        layers: share of each head, by layer.
        most: the share that has the full colour.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    shares = np.array(list(layers.values()))
    axes = figure.subplots()
    # One colour that grows opaque: it reads on a white page and on a dark one.
    colours = LinearSegmentedColormap.from_list("opacity", [to_rgba(BLUE, 0.04), to_rgba(BLUE, 1.0)])
    axes.pcolormesh(shares, cmap=colours, vmin=0, vmax=most, edgecolor="none")
    if shares.size <= 64:
        for (layer, head), share in np.ndenumerate(shares):
            colour = PAGE if share > 0.65 * most else INK
            axes.text(head + 0.5, layer + 0.5, f"{share:.0%}", ha="center", va="center", fontsize=9, color=colour)
    step = 1 + (len(shares) - 1) // 16
    axes.set_yticks(np.arange(0, len(shares), step) + 0.5, [name.removeprefix("layer") for name in layers][::step])
    step = 1 + (shares.shape[1] - 1) // 16
    axes.set_xticks(np.arange(0, shares.shape[1], step) + 0.5, [str(head) for head in range(0, shares.shape[1], step)])
    axes.set(xlabel="head", ylabel="layer", ylim=(len(shares), 0))
    axes.tick_params(length=0)


def attention_by_layer(figure: Any, found: dict[str, dict[str, list[float]]]) -> None:
    """The mean over heads and, below it faintly, each head, by layer; before training, after it, and without the biases."""
    axes = figure.subplots()
    styles = {"untrained": ("grey", "--"), "trained": (BLUE, "-"), "without_bias": (ORANGE, "-")}
    for name, layers in found.items():
        shares = np.array(list(layers.values()))
        colour, line = styles[name]
        at = np.arange(len(shares))
        axes.plot(np.repeat(at, shares.shape[1]), shares.ravel(), ".", color=colour, markersize=3, alpha=0.45)
        axes.plot(at, shares.mean(axis=1), line, marker="o", color=colour, markersize=4, label=name.replace("_", " "))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set(xlabel="layer", ylabel="attention to sinks", ylim=(0, None))
    axes.legend(frameon=False, fontsize=9)


def worth_of_signals(figure: Any, signals: dict[str, dict[str, float]]) -> None:
    """How much AUC falls where a number that targets are told is set to its mean, the largest first."""
    names = sorted(signals, key=lambda name: -signals[name]["auc"])
    axes = figure.subplots()
    falls = np.array([signals[name]["auc"] for name in names])
    at = np.arange(len(names))
    axes.barh(at, falls, height=0.7, color=np.where(falls < 0, ORANGE, BLUE).tolist())
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(at, [wrapped(name) for name in names])
    axes.set(xlabel="AUC lost without it", ylim=(len(names) - 0.4, -0.6))
