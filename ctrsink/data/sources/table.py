"""The user's own log: an event table and an item table (csv, jsonl, parquet; local or s3://) with a column mapping."""

import pyarrow as pa

from ctrsink.config.data import ColumnSpec
from ctrsink.data.events import EventLog, OnBadRow, check_events, check_items
from ctrsink.data.sources.readers import read_rows


def read_table(path: str, items_path: str | None, columns: ColumnSpec, on_bad_row: OnBadRow) -> EventLog:
    """Read both tables; without an item table the items are the ids of the log, in order, and have no field but `item`.

    Raises:
        InputError: a file, a column or (unless skipped) a row cannot be used.
    """
    items = check_items(read_rows(items_path)) if items_path else None
    known = items.column("item").combine_chunks() if items is not None else None
    events, skipped = check_events(read_rows(path), columns, known, on_bad_row)
    if items is None:
        items = pa.table({"item": events.column("item").unique().sort()})
    return EventLog(events, items, skipped)
