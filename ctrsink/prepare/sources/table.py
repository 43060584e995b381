"""A log of the user's own: csv, jsonl or parquet, one file or a folder of many, by the names of its columns."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import pyarrow as pa

from ctrsink.config.data import ColumnSpec
from ctrsink.dataset.arrow import pc
from ctrsink.dataset.cells import truth_as_numbers
from ctrsink.errors import InputError, did_you_mean, listed
from ctrsink.prepare.check_rows import RawRows, check_items
from ctrsink.prepare.sources.cut import cut_lines
from ctrsink.prepare.sources.delimited import csv_blocks, read_csv_block
from ctrsink.prepare.sources.files import EmptyFile, files_at, read_head, read_part, read_whole, require_columns
from ctrsink.prepare.sources.raw_log import Block
from ctrsink.prepare.sources.readers import kind_of, open_parquet, read_jsonl, read_row_groups, read_table

T = TypeVar("T")


@dataclass(frozen=True)
class Tables:
    """An event log and, perhaps, an item table; each a file or a folder of files of one kind."""

    path: str
    item_table: str | None
    columns: ColumnSpec
    item_columns: Mapping[str, str] = field(default_factory=dict)
    """Columns of the item table by what they are called here: `item`, and fields."""
    fields: Collection[str] | None = None
    """Those that must be text; None: all."""
    told: tuple[str, ...] = ()
    """Columns of the log that are read beside those that are mapped."""

    def items(self) -> pa.Table | None:
        """The item table; its files may have different fields, and a missing one is an empty text."""
        if self.item_table is None:
            return None
        key = self.item_columns.get("item", "item")
        needed = None if self.fields is None else {self.item_columns.get(name, name) for name in self.fields}
        files = _files(self.item_table)
        read = [rows for uri, _ in files for rows in _unless_empty(files, partial(_item_rows, uri, key))]
        if not read:
            raise InputError(f"the item table {self.item_table} is empty")
        tables = [check_items(rows, key, needed) for rows in read]
        items = self._renamed(pa.concat_tables(tables, promote_options="default"))
        counts = items.column("item").value_counts()
        repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        if len(repeated):
            raise InputError(f"{self.item_table}: item {repeated[0].as_py()!r} is in more than one file: leave one")
        return pa.table({name: pc.fill_null(items.column(name), "") for name in items.column_names})

    def blocks(self, block_bytes: int) -> list[Block]:
        """csv and jsonl are cut at rows, parquet between row groups; a packed file is one block."""
        cut = {"csv": self._csv, "jsonl": self._jsonl, "parquet": self._parquet}
        files = _files(self.path)
        pieces = [_unless_empty(files, partial(cut[kind_of(uri)], uri, size, block_bytes)) for uri, size in files]
        blocks = [block for piece in pieces for block in piece]
        if not blocks:
            raise InputError(f"the event log {self.path} holds no event: it has no row")
        return blocks

    def read(self, block: Block) -> RawRows:
        """The mapped columns, and those `told`, of the rows of a block; `true` and `false` in feedback and label are 1 and 0."""
        kind = kind_of(block.file)
        if kind == "parquet":
            groups = range(block.start, block.end)
            return read_row_groups(block.file, open_parquet(block.file), groups, self._wanted)
        if kind == "csv":
            raw = read_csv_block(block, self._wanted)
        else:
            packed = block.file.endswith(".gz")
            content = read_whole(block.file) if packed else read_part(block.file, block.start, block.end)
            raw = read_jsonl(
                block.file, content, self._wanted, (self.columns.user, self.columns.item, self.columns.request or "")
            )
        return _with_numbers(raw, {self.columns.feedback, self.columns.label} - {None})

    def _renamed(self, items: pa.Table) -> pa.Table:
        """The checked item table by the names of `item_columns`, the others as they are; what is mapped takes a name first."""
        key = self.item_columns.get("item", "item")
        taken = {name: "item" if theirs == key else theirs for name, theirs in self.item_columns.items() if name != "item"}
        for name, theirs in taken.items():
            if theirs == "item" and key not in ("item", self.item_columns[name]):
                raise InputError(
                    f"{self.item_table}: prepare.source.items_columns takes the ids from {key!r}, and {name} from 'item', "
                    "which is what the ids are called here: rename that column in the table"
                )
            if theirs not in items.column_names:
                raise InputError(
                    f"{self.item_table} has no column {theirs!r}, which prepare.source.items_columns names for {name}; "
                    f"it has {listed(items.column_names)}{did_you_mean(theirs, items.column_names, ': ')}"
                )
        rest = ["item", *(name for name in items.column_names if name not in ("item", *taken, *taken.values()))]
        return pa.table({**{name: items.column(name) for name in rest}, **{n: items.column(t) for n, t in taken.items()}})

    @property
    def _wanted(self) -> list[str]:
        mapped = (self.columns.user, self.columns.item, self.columns.timestamp)
        optional = (self.columns.feedback, self.columns.label, self.columns.request)
        return list(dict.fromkeys([*mapped, *(name for name in optional if name), *self.told]))

    def _csv(self, uri: str, size: int, block_bytes: int) -> list[Block]:
        return csv_blocks(uri, block_bytes, self._wanted)

    def _jsonl(self, uri: str, size: int, block_bytes: int) -> list[Block]:
        head = read_head(uri)
        first = read_jsonl(uri, head[: head.rfind(b"\n") + 1] or head)
        if not first.table.num_columns:
            number, reason = first.broken[0] if first.broken else (1, "it has no key")
            raise InputError(f"{uri}, line {number}: {reason}, and no other line at its start is")
        require_columns(uri, first.table.column_names, self._wanted)
        pieces = [(0, size)] if uri.endswith(".gz") else cut_lines(uri, 0, size, block_bytes)
        return [Block(uri, start, end) for start, end in pieces]

    def _parquet(self, uri: str, size: int, block_bytes: int) -> list[Block]:
        file = open_parquet(uri)
        require_columns(uri, file.schema_arrow.names, self._wanted)
        blocks: list[Block] = []
        start, held = 0, 0
        for group in range(file.num_row_groups):
            held += file.metadata.row_group(group).total_byte_size
            if held >= block_bytes or group + 1 == file.num_row_groups:
                blocks.append(Block(uri, start, group + 1))
                start, held = group + 1, 0
        return blocks


def _files(uri: str) -> list[tuple[str, int]]:
    """The files of a table, all of one kind."""
    files = files_at(uri)
    kinds = {kind_of(file): file for file, _ in files}
    if len(kinds) > 1:
        raise InputError(f"{uri} holds files of several kinds ({', '.join(sorted(kinds.values()))}): a table is of one kind")
    return files


def _item_rows(uri: str, key: str) -> list[RawRows]:
    raw = read_table(uri, ids=(key,))
    if not raw.file_rows:
        raise EmptyFile(f"the item table {uri} is empty")
    return [raw]


def _unless_empty(files: list[tuple[str, int]], read: Callable[[], list[T]]) -> list[T]:
    """What `read` gives, or nothing where one of several `files` turns out to hold nothing."""
    try:
        return read()
    except EmptyFile:
        if len(files) == 1:
            raise
        return []


def _with_numbers(raw: RawRows, names: set[str | None]) -> RawRows:
    table = raw.table
    for name in names:
        table = table.set_column(table.column_names.index(name), name, truth_as_numbers(table.column(name)))
    return replace(raw, table=table)
