"""A request as the model's signals see it: the same columns, by the same functions, as a data set's events."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ctrsink.dataset.column_cells import known, stored
from ctrsink.dataset.known import known_events
from ctrsink.dataset.shard import user_hashes
from ctrsink.dataset.values import id_text, one_form, text
from ctrsink.errors import InputError, did_you_mean
from ctrsink.features.columns import Column
from ctrsink.features.fields import field_ids
from ctrsink.features.histories import Histories
from ctrsink.features.ragged import Ragged
from ctrsink.prepare.check_rows import LARGEST_FEEDBACK
from ctrsink.serve.knowledge import Knowledge
from ctrsink.serve.requests import Behaviour, Item, Request, item_table


def histories_of(request: Request, timestamps: np.ndarray, knowledge: Knowledge, vectors: np.ndarray | None = None) -> Histories:
    """The history, and behind it the candidates, each asked after the whole history.

    Args:
        timestamps: int64 [N], whole seconds, of all of them.
        vectors: float16 [N, width], of their items' texts, where neighbours go by these, too.
    """
    count, candidates = len(request.history), len(request.candidates)
    items = [*(b.item for b in request.history), *request.candidates]
    rows = knowledge.rows([id_text(item.get("id")) for item in items])
    mean, number = knowledge.received(rows)
    mean = _overridden(mean, items, "item_mean")
    number = _overridden(number, items, "item_count")
    values = np.concatenate([[outcome(b, knowledge) for b in request.history], np.full(candidates, np.nan)])
    labels = np.array([label(b, knowledge) for b in request.history] + [-1] * candidates, np.int8)
    table = item_table(items, [f.column for f in knowledge.fields])
    cells = [one_form(table.column(f.column).combine_chunks()).to_pylist() for f in knowledge.fields]
    fields = [
        np.array([n for f, own in zip(knowledge.fields, cells, strict=True) for n in field_ids(f.column, f.separator, own[row])])
        for row in range(len(items))
    ]
    # In the range that the neighbours are of the user's own part is taken out, as it was in training.
    inside = counted = np.zeros(count + candidates, np.bool_)
    if knowledge.counted is not None:
        zeros, none = np.zeros(count, np.int64), np.zeros(candidates, np.bool_)
        inside, counted = (np.append(of, none) for of in knowledge.counted.of(timestamps[:count], zeros, np.array([count])))
    return Histories(
        begins=np.zeros(count + candidates, np.int64),
        known=np.append(known_events(_requests(request, knowledge), np.array([count])), np.full(candidates, count)).astype(
            np.int64
        ),
        timestamps=timestamps,
        outcome=values.astype(np.float64),
        labels=labels,
        item_mean=mean,
        item_count=number,
        items=rows,
        counted=counted,
        inside=inside,
        fields=Ragged.of(fields),
        neighbours=knowledge.neighbours,
        vectors=vectors,
        texts=np.arange(count + candidates),
        columns={column.signal: _of_column(column, items, knowledge) for column in knowledge.columns},
        users=user_hashes([id_text(request.user)]).repeat(count + candidates),
        window=knowledge.window,
    )


def _of_column(column: Column, items: Sequence[Item], knowledge: Knowledge) -> np.ndarray:
    """The values that behaviours and candidates have, see Histories.columns."""
    values = stored(column, _cells(column, items))[0]
    if column.received:
        mean, count = knowledge.groups[column.name].received(values)
        return _overridden(mean if column.kind == "mean" else count, items, column.signal)
    return known(column, values)


def _cells(column: Column, items: Sequence[Item]) -> pa.Array:
    """A column of the item table is a field of the item. What was logged with an event stands there by the signal's name."""
    return pa.array([text(item.get(_key(column))) for item in items], pa.string())


def _key(column: Column) -> str:
    return column.signal if column.of == "log" else column.name


def _requests(request: Request, knowledge: Knowledge) -> pa.Array:
    """Ids of the requests of the behaviours, null where one stands alone."""
    seconds = [str(math.floor(b.timestamp)) if knowledge.request_is_second else None for b in request.history]
    given = [id_text(b.request) or second for b, second in zip(request.history, seconds, strict=True)]
    return pa.array(given, pa.string())


def check(request: Request, knowledge: Knowledge, base: str | None, where: str) -> None:
    """Refuse what signals cannot be computed from.

    Args:
        base: the column that has the logit that the model adds to.

    Raises:
        InputError: naming `where` and the key.
    """
    named = [(f"history.{i}", b.item) for i, b in enumerate(request.history)]
    received = [(column.signal, column.kind == "count") for column in knowledge.columns if column.received]
    for key, item in [*named, *((f"candidates.{i}", item) for i, item in enumerate(request.candidates))]:
        check_id(item.get("id"), f"{where}: {key}.id")
        _check_keys(item, knowledge, f"{where}: {key}")
        for column in knowledge.columns:
            if not column.received:
                _check_cell(column, item, f"{where}: {key}")
        for name, counts in (("item_mean", False), ("item_count", True), *received):
            value = item.get(name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST_FEEDBACK
            ):
                raise InputError(f"{where}: {key}.{name} is no number: {value!r}")
            if counts and (value or 0) < 0:
                raise InputError(f"{where}: {key}.{name} is below 0")
    for i, item in enumerate(request.candidates):
        if base is not None and base not in item:
            raise InputError(
                f"{where}: candidates.{i} has no {base}, the logit that the model adds to: give it, or null where there is none"
            )
    for i, behaviour in enumerate(request.history):
        check_id(behaviour.request, f"{where}: history.{i}.request")
    if knowledge.labelled:
        for i, behaviour in enumerate(request.history):
            if "label" not in behaviour.model_fields_set:
                raise InputError(
                    f"{where}: history.{i} has no label, which the model's signals need: give 0, 1, or null where it was none"
                )


def _check_keys(item: Item, knowledge: Knowledge, where: str) -> None:
    """Refuse a key that has the form of a signal's name and is none: its value would be left out without a word."""
    for key in item:
        if key not in knowledge.named and Column.parse(key.lower()) is not None:
            fields = [column.name for column in knowledge.columns if column.of == "item"]
            hint = did_you_mean(key, [*knowledge.named, *fields], ": ")
            raise InputError(f"{where}.{key} is no signal of the data set that the model was trained on{hint}")


def _check_cell(column: Column, item: Item, where: str) -> None:
    try:
        wrong = bool(stored(column, _cells(column, [item]))[1][0])
    except ValueError as error:
        raise InputError(f"{where}.{_key(column)}: {error}") from None
    if wrong:
        raise InputError(f"{where}.{_key(column)} is no number that float32 holds: {item[_key(column)]!r}")


def check_id(value: Any, where: str) -> None:
    """Raise InputError, naming `where`, unless `value` is an id or None."""
    try:
        id_text(value)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def outcome(behaviour: Behaviour, knowledge: Knowledge) -> float:
    """What is averaged of a behaviour; NaN where there is nothing."""
    if knowledge.outcome == "feedback":
        return np.nan if behaviour.feedback is None else float(np.float32(behaviour.feedback))
    return np.nan if behaviour.label is None else float(behaviour.label)


def label(behaviour: Behaviour, knowledge: Knowledge) -> int:
    """0, 1, or -1 where it was no impression."""
    if knowledge.labelled:
        return -1 if behaviour.label is None else behaviour.label
    return -1 if behaviour.feedback is None else int(np.float32(behaviour.feedback) >= knowledge.positive_from)


def _overridden(otherwise: np.ndarray, items: Sequence[Item], key: str) -> np.ndarray:
    """What the items say of themselves, null where nothing was known then; else what is `otherwise`."""
    given: list[Any] = [item.get(key) for item in items]
    return np.where([key in item for item in items], [np.nan if value is None else value for value in given], otherwise)
