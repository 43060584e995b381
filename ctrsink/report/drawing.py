"""Figures as PNG files in one style."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctrsink.errors import InputError

BLUE, ORANGE = "#1f5fa8", "#c8641b"


def draw_figures(drawings: Mapping[str, Callable[[Any], None]], to: str) -> list[str]:
    """Let each of `drawings` fill a figure of matplotlib, which becomes `<name>.png` in the local folder `to`; returns the files.

    Raises:
        InputError: matplotlib is not installed, or `to` is no folder.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("figures need matplotlib: install it with `pip install 'ctrsink[train]'`") from None
    folder = Path(to)
    if "://" in to or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{to}: figures are written to a local folder")
    folder.mkdir(parents=True, exist_ok=True)
    files: list[str] = []
    for name, draw in drawings.items():
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        draw(figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e4e6ea", linewidth=0.7)
            axes.set_axisbelow(True)
        files.append(str(folder / f"{name}.png"))
        figure.savefig(files[-1], dpi=120)
    return files
