"""Templates: an item's fields and an event's feedback become text."""

import re
from collections.abc import Iterable, Sequence
from string import Formatter
from typing import Any

import numpy as np
import pyarrow as pa

from ctrsink.config.data import TextSpec
from ctrsink.dataset.arrow import pc
from ctrsink.dataset.values import one_form
from ctrsink.errors import InputError, did_you_mean, listed

MAX_FEEDBACK_TEXTS = 4096
_WIDEST = 999
_WIDE = re.compile(r"\d{4}")  # a width, or a precision, that would make texts of thousands of letters


def item_texts(template: str, items: pa.Table) -> list[str]:
    """The text of every item, in the order of the item table; fields are filled in by values.one_form.

    Raises:
        InputError: the template names a field that the table does not have, or is malformed.
    """
    names = _fields("text.item", template, items.column_names)
    columns = {name: one_form(items.column(name).combine_chunks()).to_pylist() for name in names}
    rows = ({name: column[i] for name, column in columns.items()} for i in range(items.num_rows))
    return _render("text.item", template, rows)


def template_fields(template: str, key: str = "text.item") -> list[str]:
    """Names of the fields that a template uses.

    Raises:
        InputError: it is malformed; the message names `key`.
    """
    try:
        parts = list(Formatter().parse(template))
        if wide := [spec for _, _, spec, _ in parts if spec and _WIDE.search(spec)]:
            raise ValueError(f"{{:{wide[0]}}} is wider than {_WIDEST} letters")
        return list(dict.fromkeys(name for _, name, _, _ in parts if name is not None))
    except ValueError as error:
        raise InputError(f"{key} {template!r} is no template: {error}") from None


def feedback_minima(text: TextSpec, feedback: np.ndarray) -> dict[str, float]:
    """The distinct texts of some events' feedback, and the smallest feedback that gives each.

    Args:
        feedback: float32 per event, NaN where there is none.

    Raises:
        InputError: the template is wrong, or gives more texts than can be tokenised once for all.
    """
    values = _values(feedback)
    minima: dict[str, float] = {}
    for rendered, value in zip(_rendered(text, values), values.tolist(), strict=True):
        minima.setdefault(rendered, value)
    _check_count(text, minima)
    return minima


def feedback_table(text: TextSpec, known: Sequence[str], minima: dict[str, float]) -> tuple[str, ...]:
    """What may follow a behaviour's item text: its feedback, then the separator.

    The text of an absent feedback, the separator alone, comes first; the others are ordered by their smallest feedback. Texts
    that a data set has already (`known`) stay where they are.

    Raises:
        InputError: there are more than can be tokenised once for all.
    """
    _check_count(text, minima)
    ordered = sorted(minima, key=lambda rendered: (minima[rendered], rendered))
    return tuple(dict.fromkeys([*known, text.separator, *ordered]))


def feedback_ids(text: TextSpec, table: Sequence[str], feedback: np.ndarray) -> np.ndarray:
    """int16 per event: the row of its feedback's text in `table` (see feedback_table)."""
    row = {rendered: number for number, rendered in enumerate(table)}
    values = _values(feedback)
    ids = np.array([*(row[rendered] for rendered in _rendered(text, values)), row[text.separator]], np.int16)
    # NaN is found behind all values, where the id of the separator alone stands.
    return ids[np.searchsorted(values, feedback + np.float32(0))]


def _values(feedback: np.ndarray) -> np.ndarray:
    """Distinct values that are there, ascending; -0 is 0."""
    values = pc.unique(pa.array(feedback + np.float32(0))).to_numpy()
    return np.sort(values[~np.isnan(values)])


def _rendered(text: TextSpec, values: np.ndarray) -> list[str]:
    _fields("text.feedback", text.feedback, ["feedback"])
    return [r + text.separator for r in _render("text.feedback", text.feedback, ({"feedback": v} for v in values.tolist()))]


def _check_count(text: TextSpec, minima: dict[str, float]) -> None:
    if len(minima) >= MAX_FEEDBACK_TEXTS:
        example = list(minima)[len(minima) // 2].removesuffix(text.separator)
        raise InputError(
            f"text.feedback {text.feedback!r} gives {len(minima) + 1} different texts (such as {example!r}), more than "
            f"{MAX_FEEDBACK_TEXTS}: use a coarser format, such as {{feedback:.1f}}"
        )


def _fields(key: str, template: str, known: list[str]) -> list[str]:
    """Names that the template uses, checked; only plain names are allowed, no attribute and no index."""
    names = template_fields(template, key)
    for name in names:
        if name not in known:
            raise InputError(
                f"{key} {template!r} names the field {name!r}, which does not exist; there are {listed(known)}"
                f"{did_you_mean(name, known, ': ')}"
            )
    return names


def _render(key: str, template: str, rows: Iterable[dict[str, Any]]) -> list[str]:
    try:
        return [template.format_map(row) for row in rows]
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"{key} {template!r} cannot be filled in: {error}") from None
