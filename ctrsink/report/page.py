"""A page in one file: sections of tables, figures and notes, with nothing to load from elsewhere and no script."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ctrsink.errors import InputError
from ctrsink.report.drawing import THEME, as_svg

SIZE = (4.4, 3.1)
"""Inches of a figure: its text reads on a phone's width, and where there is room others stand beside it."""


@dataclass(frozen=True)
class Table:
    """Rows under a head; numbers are aligned to the right."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    left: int = 1
    """Columns that are text."""
    folded: str = ""
    """Folded away behind these words; empty: it is shown."""


@dataclass(frozen=True)
class Figure:
    """What `draw` fills a figure of matplotlib with."""

    kind: ClassVar[str] = "figure"
    caption: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = SIZE


@dataclass(frozen=True)
class Note:
    """A sentence: a remark, a warning, or what is missing here and why."""

    kind: ClassVar[str] = "note"
    text: str
    missing: bool = False
    warning: bool = False


@dataclass(frozen=True)
class Listing:
    """Text as it stands in a file, folded away."""

    kind: ClassVar[str] = "listing"
    title: str
    text: str


Part = Table | Figure | Note | Listing


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: Sequence[Part]
    lead: str = ""

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    kind: str
    """What it is of: a run, or a study."""
    place: str
    """Its folder."""
    sections: Sequence[Section]
    cards: Sequence[tuple[str, str, str]] = ()
    """What is read first: a name, a value, and a remark below it."""
    written: str = ""
    """When, and by what."""


# A password in an address: name and password before the host, or a parameter that says what it is.
_SECRETS = re.compile(
    r"(?<=://)(?:[^\s/@'\"]*:[^\s'\"]*|[^\s/@'\"]+)(?=@)"
    r"|(?<=[?&])([\w-]*(?:token|password|secret|signature|sig|key|keyid|credential)=)[^&\s'\"]+",
    re.I,
)


def without_secrets(text: str) -> str:
    """`text`, with names, passwords and tokens in its addresses blotted out."""
    return _SECRETS.sub(lambda found: f"{found[1] or ''}***", text)


def _shown(value: Any) -> Any:
    """Whatever text a page shows; figures are drawn already."""
    return without_secrets(value) if type(value) is str else value


def render(page: Page) -> str:
    """The page as HTML; text of any kind is escaped. The same page gives the same bytes.

    Raises:
        InputError: jinja2 or matplotlib is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise InputError("a report needs jinja2: install it with `pip install 'ctrsink[train]'`") from None
    environment = Environment(
        loader=PackageLoader("ctrsink.report", "templates"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = 0

    def svg(figure: Figure) -> Markup:
        nonlocal drawn
        drawn += 1
        return Markup(as_svg(figure.draw, figure.size, f"figure-{drawn}", figure.caption))

    return environment.get_template("page.html").render(page=page, svg=svg, theme=THEME)
