"""Templates: an item's fields and an event's feedback become text."""

from collections.abc import Iterable
from string import Formatter
from typing import Any

import numpy as np
import pyarrow as pa

from ctrsink.config.data import TextSpec
from ctrsink.errors import InputError

MAX_FEEDBACK_TEXTS = 4096


def item_texts(template: str, items: pa.Table) -> list[str]:
    """The text of every item, in the order of the item table.

    Raises:
        InputError: the template names a field that the table does not have, or is malformed.
    """
    names = _fields("text.item", template, items.column_names)
    columns = {name: items.column(name).to_pylist() for name in names}
    rows = ({name: column[i] for name, column in columns.items()} for i in range(items.num_rows))
    return _render("text.item", template, rows)


def feedback_texts(text: TextSpec, feedback: np.ndarray) -> tuple[list[str], np.ndarray]:
    """What follows a behaviour's item text: its feedback, then the separator.

    Returns:
        The distinct texts, that of an absent feedback (the separator alone) first, and int16 per event, its text;
        `feedback` is float32 per event, NaN where there is none.

    Raises:
        InputError: the template is wrong, or gives more texts than can be tokenised once for all.
    """
    _fields("text.feedback", text.feedback, ["feedback"])
    values, inverse = np.unique(feedback + np.float32(0), return_inverse=True)  # -0 becomes 0; one NaN, at the end
    present = values[~np.isnan(values)]
    rendered = _render("text.feedback", text.feedback, ({"feedback": float(value)} for value in present))
    texts = list(dict.fromkeys([text.separator, *(r + text.separator for r in rendered)]))
    if len(texts) > MAX_FEEDBACK_TEXTS:
        example = rendered[len(rendered) // 2]
        raise InputError(
            f"text.feedback {text.feedback!r} gives {len(texts)} different texts (such as {example!r}), more than "
            f"{MAX_FEEDBACK_TEXTS}: use a coarser format, such as {{feedback:.1f}}"
        )
    row = {t: i for i, t in enumerate(texts)}
    ids = np.zeros(len(values), np.int16)
    ids[: len(present)] = [row[r + text.separator] for r in rendered]
    return texts, ids[inverse]


def _fields(key: str, template: str, known: list[str]) -> list[str]:
    """Names that the template uses, checked; only plain names are allowed, no attribute and no index."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InputError(f"{key} {template!r} is no template: {error}") from None
    for name in names:
        if name not in known:
            raise InputError(f"{key} {template!r} names the field {name!r}, which does not exist; there are {', '.join(known)}")
    return list(dict.fromkeys(names))


def _render(key: str, template: str, rows: Iterable[dict[str, Any]]) -> list[str]:
    try:
        return [template.format_map(row) for row in rows]
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"{key} {template!r} cannot be filled in: {error}") from None
