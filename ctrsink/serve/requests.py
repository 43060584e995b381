"""Requests: one user's history and the candidates to score behind it, read from JSON or taken from a data set."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationError

from ctrsink.config.base import Section
from ctrsink.config.explain import explain
from ctrsink.dataset.arrow import from_parquet
from ctrsink.dataset.manifest import read_file
from ctrsink.dataset.reader import Dataset
from ctrsink.dataset.values import text
from ctrsink.errors import InputError, did_you_mean
from ctrsink.features.columns import columns_of
from ctrsink.prepare.check_rows import LARGEST_FEEDBACK
from ctrsink.prepare.render import template_fields

Item = dict[str, Any]
# Beyond the year 5138 a time was counted in milliseconds.
Timestamp = Annotated[float, Field(strict=True, ge=-(10**11), le=10**11)]


class Behaviour(Section):
    """An event of the history."""

    item: Item
    """Fields of the item, at least those that the model's template names."""
    feedback: Annotated[float, Field(strict=True, ge=-LARGEST_FEEDBACK, le=LARGEST_FEEDBACK)] | None = None
    label: Literal[0, 1] | None = None
    """Whether it was a click, for models of a log with a label column; elsewhere it follows from the feedback."""
    timestamp: Timestamp
    """Seconds since 1970."""
    request: Annotated[str, Field(strict=True)] | Annotated[int, Field(strict=True)] | None = None
    """Id shared by behaviours that were shown at one moment: none of them was known when the others were."""


class Request(Section):
    """What one user may be shown at one moment."""

    history: tuple[Behaviour, ...] = ()
    """In any order; sorted by time, ties as given."""
    candidates: tuple[Item, ...] = Field(min_length=1)
    timestamp: Timestamp
    """The moment; no behaviour may be later."""
    user: Annotated[str, Field(strict=True)] | Annotated[int, Field(strict=True)] | None = None
    """Id of the user, for models that are told `user_id`."""
    id: Any = None
    """Returned with the probabilities."""


def parse_request(tree: Any, fields: Sequence[str], where: str) -> Request:
    """Validate one request for a model that reads `fields` of items; the history comes back sorted.

    Raises:
        InputError: naming `where` and the key.
    """
    try:
        request = Request.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, Request)}") from None
    named = [(f"history.{i}.item", b.item) for i, b in enumerate(request.history)]
    for key, item in [*named, *((f"candidates.{i}", item) for i, item in enumerate(request.candidates))]:
        for field in fields:
            if field not in item:
                hint = did_you_mean(field, item)
                raise InputError(f"{where}: {key} has no field {field!r}, which the model needs{hint}")
            try:
                text(item[field])
            except ValueError as error:
                raise InputError(f"{where}: {key}.{field}: {error}") from None
    for i, behaviour in enumerate(request.history):
        if behaviour.timestamp > request.timestamp:
            raise InputError(f"{where}: history.{i}.timestamp {behaviour.timestamp:.0f} is later than the request's")
    return request.model_copy(update={"history": tuple(sorted(request.history, key=lambda b: b.timestamp))})


def item_table(items: Sequence[Item], fields: Sequence[str]) -> pa.Table:
    """The items' `fields` as text, as preparation holds them (see values.text): empty where a value is missing."""
    columns = {field: pa.array([text(item[field]) or "" for item in items], pa.string()) for field in fields}
    # A template without a field still renders every item: the table's length must not come from its columns.
    return pa.table({"": pa.nulls(len(items)), **columns})


def request_of(dataset: Dataset, user: int, event: int, candidates: Sequence[int] | None = None) -> dict[str, Any]:
    """The request that a user met at one of their events, as a JSON object; its history is what came before that request.

    `user` is a row of the data set's index, `event` a number in that user's chronology, `candidates` are rows of the item table,
    by default the event's own item.
    """
    shard, row = dataset.locate(user)
    entry = dataset.manifest.shards[int(dataset.index["shard"][user])].events_file
    of_events = [column for column in columns_of(dataset.manifest.columns) if column.by_event]
    received = ("item_mean", "item_count", *(column.signal for column in of_events if column.received))
    logged = [column.signal for column in of_events if not column.received]
    names = ["item", "timestamp", "feedback", "label", "request", *received, *logged]
    table = from_parquet(read_file(dataset.uri, entry), columns=names)
    log: dict[str, list[Any]] = {name: table.column(name)[row].as_py() for name in names}
    if not 0 <= event < len(log["item"]):
        raise InputError(f"user {shard.users[row]} has {len(log['item'])} events, there is no event {event}")
    chosen = [log["item"][event]] if candidates is None else list(candidates)
    known = int(shard.known[shard.offsets[row] + event])
    together: list[int] = np.flatnonzero(shard.known[shard.offsets[row] : shard.offsets[row + 1]] == known).tolist()
    items = _items(dataset, [*log["item"][:known], *chosen])
    for number, item in enumerate(items):
        # Where the user met a candidate: how it was received until then. The model's own table is that of the end of the log.
        place = number if number < known else _met(log["item"], chosen[number - known], event, together)
        if place is not None:
            item |= {name: log[name][place] for name in received}
        # What was logged with a candidate is known of those that the user met in this request.
        shown = place if number < known or place in together else None
        item |= {name: None if shown is None else log[name][shown] for name in logged}
    history = [
        {"item": items[place]} | {name: log[name][place] for name in ("feedback", "label", "timestamp", "request")}
        for place in range(known)
    ]
    name = str(shard.users[row])
    return {"history": history, "candidates": items[known:], "timestamp": log["timestamp"][event], "user": name}


def _met(items: list[int], item: int, event: int, together: list[int]) -> int | None:
    """The user's event with this item: `event`, or one of its request, the next one, or the last; None: there is none."""
    places = [place for place, met in enumerate(items) if met == item]
    return min(places, key=lambda at: (at != event, at not in together, at < event, abs(at - event)), default=None)


def _items(dataset: Dataset, rows: list[int]) -> list[Item]:
    """Ids and fields of the items in these rows, just the fields that the data set's template and signals use."""
    table = dataset.read_items()
    names = [*template_fields(dataset.manifest.text.item), *(field.column for field in dataset.manifest.statistics.fields)]
    names += [column.name for column in columns_of(dataset.manifest.columns) if column.of == "item"]
    # The log's column `item` is kept as `id`.
    columns = {"id": "id"} | {name: "id" if name == "item" else name for name in names}
    values = {name: table.column(column).take(pa.array(rows, pa.int64())).to_pylist() for name, column in columns.items()}
    return [{name: column[i] for name, column in values.items()} for i in range(len(rows))]
