"""Raw rows become events and items; the check names the row and the column of what cannot be used."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ctrsink.config.data import ColumnSpec
from ctrsink.data.arrow import pc
from ctrsink.errors import InputError

log = logging.getLogger("ctrsink.data")

OnBadRow = Literal["fail", "skip"]

EVENTS_SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("item", pa.string()),
        ("timestamp", pa.int64()),  # seconds since 1970
        ("feedback", pa.float32()),  # null where there was none
        ("label", pa.int8()),  # as logged: 0, 1 or null
        ("request", pa.string()),
    ]
)

_NUMBER = r"^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_LATEST = 10**11  # the year 5138; what lies beyond was counted in milliseconds


@dataclass(frozen=True)
class RawRows:
    """A table as it was read, before any cell was looked at."""

    file: str
    table: pa.Table
    numbers: np.ndarray  # 1-based number of each row in the file, without the header
    header_lines: int | None = None  # line = row number + this; None where lines are not rows
    broken: list[tuple[int, str]] = field(default_factory=list)  # rows that could not be split into columns: (number, why)
    taken: int | None = None  # rows of the file that it was made of, where these are not the table's and the broken ones

    @property
    def file_rows(self) -> int:
        """Rows of the file that it was made of."""
        return self.table.num_rows + len(self.broken) if self.taken is None else self.taken

    def place(self, number: int) -> str:
        """Where row `number` is, in words."""
        return place(self.file, number, self.header_lines)

    def column(self, name: str) -> pa.Array:
        """One column as a single array; raises InputError naming the columns there are."""
        if name not in self.table.column_names:
            raise InputError(f"{self.file} has no column {name!r}; it has {', '.join(self.table.column_names) or 'none'}")
        return self.table.column(name).combine_chunks()


@dataclass(frozen=True)
class Problem:
    """The first row of a block that cannot be used."""

    row: int
    """Counted from 1 within the block."""
    what: str


@dataclass(frozen=True)
class Checked:
    """The rows of a block that can be used, and what is known of the others."""

    events: pa.Table
    """EVENTS_SCHEMA, in the order of the log."""
    rows: int
    """Of the block, good and bad."""
    problem: Problem | None


def place(file: str, number: int, header_lines: int | None) -> str:
    """Where row `number` of a file is, in words; `header_lines` as in RawRows."""
    line = "" if header_lines is None else f" (line {number + header_lines})"
    return f"{file}, row {number}{line}"


def check_events(raw: RawRows, columns: ColumnSpec, items: pa.Array | None) -> Checked:
    """Look at every cell of raw rows.

    `items` holds the ids of the item table, or is None where every item is welcome.

    Raises:
        InputError: a column is missing or cannot hold what it should.
    """
    checks = _Checks()
    user, item = (checks.text(raw, name) for name in (columns.user, columns.item))
    if items is not None:
        known = pc.fill_null(pc.is_in(item, value_set=items), False)
        checks.add(columns.item, ~_mask(known), item, "{value!r} is not in the item table")
    timestamp = checks.timestamp(raw, columns.timestamp)
    rows = len(user)
    feedback = checks.number(raw, columns.feedback) if columns.feedback else np.full(rows, np.nan)
    label = checks.label(raw, columns.label) if columns.label else np.full(rows, np.nan)
    request = _requests(raw.column(columns.request)) if columns.request else pa.nulls(rows, pa.string())

    bad = checks.bad(rows)
    problem = _first_problem(raw, checks, bad) if bad.any() or raw.broken else None
    good = ~bad
    arrays = [
        user,
        item,
        pa.array(np.where(good, timestamp, 0).astype(np.int64)),
        pa.array(feedback.astype(np.float32), mask=np.isnan(feedback)),
        pa.array(np.nan_to_num(label).astype(np.int8), mask=np.isnan(label)),
        request,
    ]
    table = pa.Table.from_arrays(arrays, schema=EVENTS_SCHEMA)
    return Checked(table.filter(pa.array(good)) if bad.any() else table, rows + len(raw.broken), problem)


def check_items(raw: RawRows, key: str = "item") -> pa.Table:
    """Turn raw rows into an item table: `item` and the other columns as text, an empty text where there was none.

    Raises:
        InputError: there is no column `item` or no row, an id is missing or appears twice, a column does, a row is broken.
    """
    names = raw.table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"the item table {raw.file} has the column {twice[0]!r} more than once: rename or drop one")
    checks = _Checks()
    ids = checks.text(raw, key)
    counts = ids.value_counts()
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    checks.add(key, _mask(pc.is_in(ids, value_set=repeated)), ids, "{value!r} appears more than once")
    bad = checks.bad(len(ids))
    if bad.any() or raw.broken:
        problem = _first_problem(raw, checks, bad)
        raise InputError(f"{raw.place(problem.row)}{problem.what}")
    if not len(ids):
        raise InputError(f"the item table {raw.file} is empty")
    fields = {n: pc.fill_null(_as_text(raw.column(n)), "") for n in raw.table.column_names if n != key}
    return pa.table({"item": ids, **fields})


class _Checks:
    """Collects, column by column, which rows are bad and what was found there."""

    def __init__(self) -> None:
        self.found: list[tuple[np.ndarray, Callable[[int], str]]] = []

    def add(self, column: str, mask: np.ndarray, values: pa.Array, message: str) -> None:
        def describe(index: int) -> str:
            value: Any = values[index].as_py()
            return f"column {column}: {message.format(value=value)}"

        if mask.any():
            self.found.append((mask, describe))

    def bad(self, rows: int) -> np.ndarray:
        out = np.zeros(rows, bool)
        for mask, _ in self.found:
            out |= mask
        return out

    def text(self, raw: RawRows, name: str) -> pa.Array:
        values = _as_text(raw.column(name))
        self.add(name, _mask(pc.fill_null(pc.equal(values, ""), True)), values, "a value is missing")
        return values

    def number(self, raw: RawRows, name: str) -> np.ndarray:
        """float64, NaN where the cell is empty."""
        cells = raw.column(name)
        if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
            text = pc.utf8_trim_whitespace(cells)
            valid = pc.match_substring_regex(text, _NUMBER)
            wrong = pc.and_(pc.invert(valid), pc.not_equal(text, ""))
            self.add(name, _mask(pc.fill_null(wrong, False)), cells, "{value!r} is not a number")
            cells = pc.if_else(valid, text, pa.scalar(None, text.type))
        try:
            values = pc.cast(cells, pa.float64()).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise InputError(f"{raw.file}: column {name} must hold numbers, but it is of type {cells.type}") from None
        self.add(name, np.isinf(values), cells, "{value!r} is not a finite number")
        return values

    def timestamp(self, raw: RawRows, name: str) -> np.ndarray:
        """float64 without fraction, in seconds."""
        cells = raw.column(name)
        if pa.types.is_timestamp(cells.type):
            seconds = pc.cast(cells, pa.timestamp("s", cells.type.tz), safe=False)
            values = pc.cast(pc.cast(seconds, pa.int64()), pa.float64()).to_numpy(zero_copy_only=False)
        else:
            values = np.floor(self.number(raw, name))
            self.add(name, np.abs(values) > _LATEST, cells, "{value} is no time in seconds since 1970 (is it in milliseconds?)")
        self.add(name, np.isnan(values), cells, "the timestamp is missing")  # after what is more exactly known to be wrong
        return values

    def label(self, raw: RawRows, name: str) -> np.ndarray:
        values = self.number(raw, name)
        wrong = ~(np.isnan(values) | (values == 0) | (values == 1))
        self.add(name, wrong, raw.column(name), "{value!r} is no label, it must be 0, 1 or empty")
        return values


def _mask(values: pa.Array) -> np.ndarray:
    return values.to_numpy(zero_copy_only=False)


def _requests(cells: pa.Array) -> pa.Array:
    """Ids of requests, null where there is none: blank cells would be one request, and hide events from each other."""
    texts = pc.cast(cells, pa.string())
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(texts), ""), pa.scalar(None, pa.string()), texts)


def _as_text(cells: pa.Array) -> pa.Array:
    """Strings; the entries of a list are joined by spaces."""
    try:
        return pc.cast(cells, pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        values = (" ".join(map(str, v)) if isinstance(v, list) else v for v in cells.to_pylist())
        return pa.array([None if v is None else str(v) for v in values], pa.string())


def _first_problem(raw: RawRows, checks: _Checks, bad: np.ndarray) -> Problem:
    """The bad row that comes first in the file, and the first of its columns that is bad."""
    broken = min(raw.broken, default=None)
    if broken and (not bad.any() or broken[0] < raw.numbers[bad.argmax()]):
        return Problem(broken[0], f": {broken[1]}")
    index = int(bad.argmax())
    what = next(describe(index) for mask, describe in checks.found if mask[index])
    return Problem(int(raw.numbers[index]), f", {' '.join(what.split())}")
