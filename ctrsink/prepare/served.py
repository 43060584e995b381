"""What a service logged, and the clicks that came of it, become a log that `ctrsink data prepare` reads."""

from typing import Any

import pyarrow as pa

from ctrsink import storage
from ctrsink.dataset.arrow import from_parquet, pc, to_parquet
from ctrsink.errors import InputError, listed
from ctrsink.prepare.sources.readers import read_table

EVENTS, ITEMS = "events", "items"
SHOWN, HISTORY = "shown", "history"
EVENT_SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("item", pa.string()),
        ("timestamp", pa.float64()),
        ("feedback", pa.float64()),
        ("label", pa.int8()),
        ("request", pa.string()),
        ("kind", pa.string()),
        ("position", pa.int32()),
        ("score", pa.float64()),
        ("model", pa.string()),
    ]
)
"""A row of a service's log `events`: a candidate (`kind` shown: with its place in the request, score and model), or a behaviour
that a request had (`kind` history: feedback, label and request as its client gave them)."""
_EVENT = ["user", "item", "timestamp"]


def join_clicks(log: str, clicks: str, to: str) -> dict[str, Any]:
    """Write `events.parquet` and `items.parquet` into the folder `to`, for a source of kind `table`.

    A candidate is an impression, with label 1 if there is a click with its `request` and `item`, else 0. A behaviour is history,
    once, however many requests repeat it; one that is an impression of the log (of the same user and item, and of the same
    request or second) only gives it its feedback. Of an item the latest text is taken.

    Args:
        log: the folder that a service wrote to.
        clicks: a table, csv, jsonl or Parquet, with the columns `request` (the `id` of the answer) and `item`.

    Returns:
        Counts: `requests`, `impressions`, `clicks`, `clicks_elsewhere` (of requests that were not logged), `behaviours`, `items`.

    Raises:
        InputError: there is no such log, or the clicks lack a column.
    """
    events = _read(log, EVENTS)
    missing = [name for name in EVENT_SCHEMA.names if name not in events.column_names]
    if missing:
        raise InputError(f"{log}/{EVENTS} has no column {missing[0]}: give a folder that `ctrsink serve --log-requests` wrote")
    clicked = _clicks(clicks)
    shown = events.filter(pc.equal(events.column("kind"), SHOWN))
    past = events.filter(pc.equal(events.column("kind"), HISTORY)).select([*_EVENT, "feedback", "label", "request"])
    past = past.group_by(past.column_names, use_threads=False).aggregate([])
    shown, past = _restated(shown, past)
    shown = shown.drop_columns(["kind", "label"]).join(clicked, ["request", "item"], use_threads=False)
    shown = shown.append_column("label", pc.fill_null(shown.column("clicked"), 0)).drop_columns("clicked")
    found = pa.concat_tables([past, shown], promote_options="default").sort_by(
        [("timestamp", "ascending"), ("user", "ascending"), ("request", "ascending"), ("position", "ascending")]
    )
    items = _latest(_read(log, ITEMS))
    storage.write_bytes(storage.join(to, f"{ITEMS}.parquet"), to_parquet(items))
    columns = [name for name in EVENT_SCHEMA.names if name != "kind"]
    storage.write_bytes(storage.join(to, f"{EVENTS}.parquet"), to_parquet(found.select(columns)))
    hits = pc.sum(shown.column("label")).as_py() or 0
    return {
        "requests": pc.count_distinct(shown.column("request")).as_py(),
        "impressions": shown.num_rows,
        "clicks": hits,
        "clicks_elsewhere": clicked.num_rows - hits,
        "behaviours": past.num_rows,
        "items": items.num_rows,
    }


def _read(log: str, name: str) -> pa.Table:
    folder = storage.join(log, name)
    files = [file for file in storage.list_files(folder) if file.endswith(".parquet")]
    if not files:
        raise InputError(f"{folder} holds no log of requests: give a folder that `ctrsink serve --log-requests` wrote")
    tables = []
    for file in files:
        try:
            tables.append(from_parquet(storage.read_bytes(storage.join(folder, file))))
        except pa.ArrowException as error:
            raise InputError(f"{folder}/{file} is damaged ({error}): remove it") from None
    return pa.concat_tables(tables, promote_options="default").combine_chunks()


def _clicks(uri: str) -> pa.Table:
    """`request`, `item` and `clicked` (1), each pair once."""
    table = read_table(uri, ids=("request", "item")).table
    for name in ("request", "item"):
        if name not in table.column_names:
            has = listed(table.column_names)
            raise InputError(f"{uri} has no column {name!r}: a click names its request and its item (there is {has})")
    pairs = pa.table({name: pc.cast(table.column(name), pa.string()) for name in ("request", "item")})
    pairs = pairs.group_by(["request", "item"], use_threads=False).aggregate([])
    return pairs.append_column("clicked", pa.array([1] * pairs.num_rows, pa.int8()))


def _restated(shown: pa.Table, past: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The impressions with the feedback that behaviours give them, and the behaviours that are no impressions."""
    shown = shown.drop_columns("feedback").append_column("row", pa.array(range(shown.num_rows)))
    past = past.append_column("row", pa.array(range(past.num_rows)))
    second = "second"
    shown, past = (of.append_column(second, pc.floor(of.column("timestamp"))) for of in (shown, past))
    given: list[pa.Table] = []
    for key in ("request", second):
        keys = ["user", "item", key]
        mine = past.select([*keys, "row", "feedback"]).filter(pc.is_valid(past.column(key)))
        mine = mine.rename_columns([*keys, "behaviour", "feedback"])
        both = shown.select([*keys, "row"]).join(mine, keys, join_type="inner", use_threads=False)
        given.append(both.select(["row", "behaviour", "feedback"]))
    pairs = pa.concat_tables(given)
    kept = past.filter(pc.invert(pc.is_in(past.column("row"), pairs.column("behaviour").combine_chunks())))
    feedback = pairs.group_by("row", use_threads=False).aggregate([("feedback", "max")]).rename_columns(["row", "feedback"])
    shown = shown.join(feedback, "row", use_threads=False)
    return shown.drop_columns(["row", second]), kept.drop_columns(["row", second])


def _latest(items: pa.Table) -> pa.Table:
    """Each item once, as the last file has it."""
    last = {item: row for row, item in enumerate(items.column("item").to_pylist())}
    return items.take(pa.array(sorted(last.values()))).sort_by("item")
