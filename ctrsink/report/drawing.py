"""Figures in one style: as PNG files, and as SVG that stands in a page and takes its colours from there."""

import io
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctrsink.errors import InputError

BLUE, ORANGE = "#1f5fa8", "#b5550f"
COLOURS = (BLUE, ORANGE, "#3a8f5c", "#8a4fa3", "#8c8c8c", "#b03a48", "#2b9aa8", "#a68a2c")
INK, GRID, PAGE = "#000000", "#e4e6ea", "#ffffff"  # INK is matplotlib's own
_ON_DARK = ("#6ea8ef", "#f0985a", "#6cc48d", "#c490dc", "#b4b4b4", "#ec7b88", "#5fc6d3", "#d3b95c")
THEME = {
    **{f"c{number}": colours for number, colours in enumerate(zip(COLOURS, _ON_DARK, strict=True))},
    "ink": (INK, "#e6e8eb"),
    "grid": (GRID, "#353b43"),
    "page": (PAGE, "#14171b"),
}
"""Colours of figures in a page, by the name of its CSS variable: on white, on dark."""
SIZE = (8.0, 4.8)
"""Inches of a PNG file."""
_VARIABLES = {light: name for name, (light, _) in THEME.items()}


def draw_figures(drawings: Mapping[str, Callable[[Any], None]], to: str) -> list[str]:
    """Let each of `drawings` fill a figure of matplotlib, which becomes `<name>.png` in the local folder `to`; returns the files.

    Raises:
        InputError: matplotlib is not installed, or `to` is no folder.
    """
    _require_matplotlib()
    folder = Path(to)
    if "://" in to or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{to}: figures are written to a local folder")
    folder.mkdir(parents=True, exist_ok=True)
    files: list[str] = []
    for name, draw in drawings.items():
        files.append(str(folder / f"{name}.png"))
        _drawn(draw, SIZE).savefig(files[-1], dpi=120)
    return files


def as_svg(draw: Callable[[Any], None], size: tuple[float, float], name: str, label: str) -> str:
    """The figure that `draw` fills, as an `<svg>` element for a page with THEME as CSS variables; the same call, the same bytes.

    Text stays text, in the page's font; nothing is loaded from elsewhere.

    Args:
        size: inches; with the text's size they say how large it reads where the page is narrow.
        name: of the figure, unlike those of the page's others: it keeps their inner names apart.
        label: what the figure shows, for who cannot see it.

    Raises:
        InputError: matplotlib is not installed.
    """
    _require_matplotlib()
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "axes.titlesize": 10, "axes.labelsize": 9}):
        out = io.StringIO()
        _drawn(draw, size).savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"\s*<style type=\"text/css\">.*?</style>", "", svg, flags=re.S)  # it would style the whole page
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # matplotlib numbers them anew in each figure
    svg = re.sub(r"((?:fill|stroke): ?)(#[0-9a-f]{6})", _from_page, svg)
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)  # the page's
    svg = re.sub(r"(<text[^>]*style=\")", r"\1fill: var(--ink); ", svg)  # before a colour of its own
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    return f'<svg {view[0]} role="img" aria-label="{_attribute(label)}">' + svg[svg.index(">") + 1 :].strip()


def wrapped(text: str, width: int = 24) -> str:
    """A name of the user's in lines that leave room for the figure beside it."""
    return textwrap.fill(text, width)


def _from_page(found: re.Match[str]) -> str:
    variable = _VARIABLES.get(found[2])
    return found[0] if variable is None else f"{found[1]}var(--{variable})"


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def _drawn(draw: Callable[[Any], None], size: tuple[float, float]) -> Any:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    with rc_context({"text.parse_math": False}):  # names come from users: a dollar sign in one is no formula
        draw(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
    return figure


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("figures need matplotlib: install it with `pip install 'ctrsink[train]'`") from None
