"""Raw rows become events and items; the check names the row and the column of what cannot be used."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ctrsink.config.data import ColumnSpec
from ctrsink.config.times import EARLIEST, LATEST
from ctrsink.config.tree import cut
from ctrsink.dataset.arrow import pc
from ctrsink.dataset.cells import moments, numbers
from ctrsink.dataset.column_cells import stored
from ctrsink.dataset.values import column_ids, column_texts
from ctrsink.errors import InputError, did_you_mean, listed
from ctrsink.features.columns import Column
from ctrsink.prepare.lookup import Lookup

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

LARGEST_FEEDBACK = float(np.finfo(np.float32).max)
"""Shards hold feedback as float32; what lies beyond would be infinite there."""
Forms = dict[str, str]
"""Ids that are whole numbers as text: the first that is written as 5 (`whole`), and as 5.0 (`fraction`)."""
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_VALUE = re.compile(r"\{value[^}]*\}")


@dataclass(frozen=True)
class RawRows:
    """A table as it was read, before any cell was looked at."""

    file: str
    table: pa.Table
    numbers: np.ndarray  # 1-based number of each row in the file, without the header
    header_lines: int | None = None  # line = row number + this; None where lines are not rows
    broken: list[tuple[int, str]] = field(default_factory=list)  # rows that could not be split into columns: (number, why)
    taken: int | None = None  # rows of the file that it was made of, where these are not the table's and the broken ones
    wrong: Mapping[str, Mapping[int, str]] = field(default_factory=dict)  # by column: rows of the table without a value, and why
    floats: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """By column of ids: the rows whose id was written as 5.0, and how exactly."""

    @property
    def file_rows(self) -> int:
        """Rows of the file that it was made of."""
        return self.table.num_rows + len(self.broken) if self.taken is None else self.taken

    def place(self, number: int) -> str:
        """Where row `number` is, in words."""
        return place(self.file, number, self.header_lines)

    def column(self, name: str) -> pa.Array:
        """One column as a single array; raises InputError naming the columns there are."""
        names = self.table.column_names
        if names.count(name) != 1:
            how_many, hint = ("more than one", "") if name in names else ("no", did_you_mean(name, names, ": "))
            raise InputError(f"{self.file} has {how_many} column {name!r}; it has {listed(names)}{hint}")
        return self.table.column(name).combine_chunks()


@dataclass(frozen=True)
class Problem:
    """The first row of a block that cannot be used."""

    row: int
    """Counted from 1 within the block."""
    what: str
    of_file: bool = False
    """The row shows that the others may be wrong too: it is not to be skipped."""


@dataclass(frozen=True)
class Checked:
    """The rows of a block that can be used, and what is known of the others."""

    events: pa.Table
    """EVENTS_SCHEMA, and a column for each signal that was asked for, in the order of the log."""
    rows: int
    """Of the block, good and bad."""
    problem: Problem | None
    forms: dict[str, Forms]
    """How the ids in the columns of user and item are written, by the name of the column."""
    reasons: dict[str, int] = field(default_factory=dict)
    """How many rows are bad for which reason; a row for its first one."""


def place(file: str, number: int, header_lines: int | None) -> str:
    """Where row `number` of a file is, in words; `header_lines` as in RawRows."""
    line = "" if header_lines is None else f" (line {number + header_lines})"
    return f"{file}, row {number}{line}"


def check_events(raw: RawRows, columns: ColumnSpec, items: Lookup | None, told: tuple[Column, ...] = ()) -> Checked:
    """Look at every cell of raw rows.

    Args:
        items: the ids of the item table, or None where every item is welcome.
        told: columns that are signals.

    Raises:
        InputError: a column is missing or cannot hold what it should.
    """
    checks = _Checks()
    user, item = (checks.ids(raw, name) for name in (columns.user, columns.item))
    checks.present(columns.user, user)
    checks.present(columns.item, item)
    if items is not None:
        checks.add(columns.item, items.find(item) < 0, item, "{value!r} is not in the item table")
    timestamp = checks.timestamp(raw, columns.timestamp)
    rows = len(user)
    feedback = checks.number(raw, columns.feedback) if columns.feedback else np.full(rows, np.nan)
    if columns.feedback:
        beyond = np.abs(feedback) > LARGEST_FEEDBACK
        checks.add(columns.feedback, beyond, raw.column(columns.feedback), "{value!r} is no feedback, it lies beyond float32")
        feedback = np.where(beyond, np.nan, feedback)
    label = checks.label(raw, columns.label) if columns.label else np.full(rows, np.nan)
    request = _unless_blank(checks.ids(raw, columns.request)) if columns.request else pa.nulls(rows, pa.string())

    extra = [checks.stored(raw, column) for column in told]
    bad = checks.bad(rows)
    some_bad = bad.any() or raw.broken
    problem, reasons = (_first_problem(raw, checks, bad), _reasons(raw, checks, bad)) if some_bad else (None, {})
    good = ~bad
    arrays = [
        user,
        item,
        pa.array(np.where(good, timestamp, 0).astype(np.int64)),
        pa.array(feedback.astype(np.float32), mask=np.isnan(feedback)),
        pa.array(np.where(good & (label > 0), 1, 0).astype(np.int8), mask=np.isnan(label)),
        request,
    ]
    table = pa.Table.from_arrays(arrays, schema=EVENTS_SCHEMA)
    for column, values in zip(told, extra, strict=True):
        table = table.append_column(column.signal, values)
    forms = {name: forms_of(ids, raw.floats.get(name)) for name, ids in ((columns.user, user), (columns.item, item))}
    return Checked(table.filter(pa.array(good)) if bad.any() else table, rows + len(raw.broken), problem, forms, reasons)


def forms_of(ids: pa.Array | pa.ChunkedArray, written: Mapping[int, str] | None = None) -> Forms:
    """The forms in which whole numbers stand among ids; `written`: by row, with a fraction, what is an id without by now."""
    found: Forms = {}
    if written:
        found["fraction"] = next(iter(written.values()))
        ids = ids.filter(pa.array(~np.isin(np.arange(len(ids)), list(written))))
    ending = ids.filter(pc.fill_null(pc.ends_with(ids, ".0"), False))
    for form, texts, digits in (("whole", ids, ids), ("fraction", ending, pc.utf8_slice_codeunits(ending, 0, -2))):
        first = pc.index(pc.ascii_is_decimal(digits), True).as_py()
        if first >= 0:
            found.setdefault(form, texts[first].as_py())
    return found


def check_items(raw: RawRows, key: str = "item", needed: Collection[str] | None = None) -> pa.Table:
    """Turn raw rows into an item table: `item`, from the column `key`, and the others as text, empty where there was none.

    Args:
        needed: columns that must be text; another one that holds what is none is left out, with a warning. None: all are.

    Raises:
        InputError: there is no column `key` or no row, an id is missing or appears twice, a column does, a row is broken, or a
            value is no text.
    """
    names = raw.table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"the item table {raw.file} has the column {twice[0]!r} more than once: rename or drop one")
    checks = _Checks()
    ids = checks.ids(raw, key)
    checks.present(key, ids)
    counts = ids.value_counts()
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    checks.add(key, _mask(pc.is_in(ids, value_set=repeated)), ids, "{value!r} appears more than once")
    fields: dict[str, pa.Array] = {}
    for name in (name for name in raw.table.column_names if name not in (key, "item")):
        column = _Checks() if needed is not None and name not in needed else checks
        fields[name] = pc.fill_null(column.texts(raw, name), "")
        if column is not checks and column.found:
            problem = _first_problem(raw, column, column.bad(len(ids)))
            log.warning("%s%s; the column is left out, no template names it", raw.place(problem.row), problem.what)
            del fields[name]
    bad = checks.bad(len(ids))
    if bad.any() or raw.broken:
        problem = _first_problem(raw, checks, bad)
        raise InputError(f"{raw.place(problem.row)}{problem.what}")
    if not len(ids):
        raise InputError(f"the item table {raw.file} is empty")
    return pa.table({"item": ids, **fields})


class _Checks:
    """Collects, column by column, which rows are bad and what was found there."""

    def __init__(self) -> None:
        self.found: list[tuple[np.ndarray, Callable[[int], str], str]] = []
        """Which rows, what was found in one of them, and the same without its value."""
        self.of_file: np.ndarray | None = None
        """Rows that are not to be skipped."""

    def add(self, column: str, mask: np.ndarray, values: pa.Array, message: str) -> None:
        def describe(index: int) -> str:
            value: Any = values[index].as_py()
            value = cut(value, 60) if isinstance(value, str) else value
            return f"column {column}: {message.format(value=value)}"

        if mask.any():
            self.found.append((mask, describe, f"column {column}: {_VALUE.sub('a value', message)}"))

    def bad(self, rows: int) -> np.ndarray:
        out = np.zeros(rows, bool)
        for mask, *_ in self.found:
            out |= mask
        return out

    def ids(self, raw: RawRows, name: str) -> pa.Array:
        """Texts, null where there is no id."""
        cells = raw.column(name)
        try:
            ids, wrong = column_ids(cells)
        except ValueError as error:
            raise InputError(f"{raw.file}: column {name} {error}") from None
        self.without(raw, name, wrong)
        if wrong and pa.types.is_floating(cells.type):
            # Where one id is too large, those that are not may have been rounded to what they are.
            mask = np.zeros(len(ids), bool)
            mask[list(wrong)] = True
            self.of_file = mask if self.of_file is None else self.of_file | mask
        return ids

    def texts(self, raw: RawRows, name: str) -> pa.Array:
        """Texts, null where there is none."""
        texts, wrong = column_texts(raw.column(name))
        self.without(raw, name, wrong)
        return texts

    def without(self, raw: RawRows, name: str, wrong: Mapping[int, str]) -> None:
        """These rows have no text, for these reasons, and neither have those of which the reader said so."""
        reasons = {**wrong, **raw.wrong.get(name, {})}
        if reasons:
            mask = np.zeros(raw.table.num_rows, bool)
            mask[list(reasons)] = True
            self.found.append((mask, lambda row: f"column {name}: {reasons[row]}", f"column {name}: a value that is no text"))

    def present(self, name: str, values: pa.Array) -> None:
        self.add(name, _mask(pc.fill_null(pc.equal(values, ""), True)), values, "a value is missing")

    def number(self, raw: RawRows, name: str) -> np.ndarray:
        """float64, NaN where the cell is empty."""
        cells = raw.column(name)
        values, wrong = self._read(raw, name, numbers)
        self.add(name, wrong, cells, "{value!r} is not a number")
        self.add(name, np.isinf(values), cells, "{value!r} is not a finite number")
        return values

    def stored(self, raw: RawRows, column: Column) -> pa.Array:
        """The values of a column that is a signal, null where the cell is blank."""
        cells = raw.column(column.name)
        values, wrong = stored(column, self.texts(raw, column.name))
        self.add(column.name, wrong, cells, "{value!r} is not a number that float32 holds")
        return values

    def timestamp(self, raw: RawRows, name: str) -> np.ndarray:
        """float64 without fraction, in seconds."""
        cells = raw.column(name)
        values, wrong = self._read(raw, name, moments)
        self.add(name, wrong, cells, "{value!r} is not a number of seconds, nor a time such as 2024-05-31T23:59:59Z")
        far = (values < EARLIEST) | (values > LATEST)
        if not pa.types.is_temporal(cells.type):
            self.add(name, far, pa.array(values), "{value:.0f} is no time in seconds since 1970 (is it in milliseconds?)")
        elif far.any():  # Python has no year above 9999
            words = pa.array(values.astype("datetime64[s]").astype(str))
            self.add(name, far, words, "{value} lies outside of the years 1 to 5138")
        self.add(name, np.isnan(values), cells, "the timestamp is missing")  # after what is more exactly known to be wrong
        return values

    def _read(
        self, raw: RawRows, name: str, read: Callable[[pa.Array], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        cells = raw.column(name)
        if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
            cells = self.texts(raw, name)
        try:
            return read(cells)
        except TypeError as error:
            raise InputError(f"{raw.file}: column {name} {error}") from None

    def label(self, raw: RawRows, name: str) -> np.ndarray:
        values = self.number(raw, name)
        wrong = ~(np.isnan(values) | (values == 0) | (values == 1))
        self.add(name, wrong, raw.column(name), "{value!r} is no label, it must be 0, 1 or empty")
        return values


def _mask(values: pa.Array) -> np.ndarray:
    return values.to_numpy(zero_copy_only=False)


def _unless_blank(ids: pa.Array) -> pa.Array:
    """Ids of requests, null where there is none: blank cells would be one request, and hide events from each other."""
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(ids), ""), pa.scalar(None, pa.string()), ids)


def _first_problem(raw: RawRows, checks: _Checks, bad: np.ndarray) -> Problem:
    """The bad row that comes first in the file, and the first of its columns that is bad; before all one not to be skipped."""
    of_file = checks.of_file is not None
    if checks.of_file is not None:
        bad = checks.of_file
    broken = None if of_file else min(raw.broken, default=None)
    if broken and (not bad.any() or broken[0] < raw.numbers[bad.argmax()]):
        return Problem(broken[0], f": {broken[1]}")
    index = int(bad.argmax())
    what = next(describe(index) for mask, describe, _ in checks.found if mask[index])
    return Problem(int(raw.numbers[index]), f", {' '.join(what.split())}", of_file)


def _reasons(raw: RawRows, checks: _Checks, bad: np.ndarray) -> dict[str, int]:
    """See Checked."""
    counts = Counter(_QUOTED.sub("a value", why) for _, why in raw.broken)
    for mask, _, reason in checks.found:
        counts[reason] += int((mask & bad).sum())
        bad = bad & ~mask
    return dict(+counts)
