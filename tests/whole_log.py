"""A source read whole: the events of all its blocks, and its items, as a preparation meets them."""

from dataclasses import dataclass

import pyarrow as pa

from ctrsink.config.data import SourceSpec
from ctrsink.errors import InputError
from ctrsink.prepare.check_rows import OnBadRow, check_events
from ctrsink.prepare.lookup import Lookup
from ctrsink.prepare.places import Places
from ctrsink.prepare.sources import open_source


@dataclass(frozen=True)
class WholeLog:
    events: pa.Table
    items: pa.Table | None
    skipped_rows: int


def read_source(spec: SourceSpec, on_bad_row: OnBadRow = "fail", block_bytes: int = 1 << 25) -> WholeLog:
    source, places, tables, rows = open_source(spec), Places(), [], 0
    items = source.items()
    for block in source.blocks(block_bytes):
        raw = source.read(block)
        checked = check_events(raw, source.columns, None if items is None else Lookup.of(items.column("item").combine_chunks()))
        where = places.next(block.file, raw.file_rows, raw.header_lines, checked.problem)
        if where and on_bad_row == "fail":
            raise InputError(where)
        tables.append(checked.events)
        rows += checked.rows
    events = pa.concat_tables(tables).combine_chunks()
    return WholeLog(events, items, rows - events.num_rows)
