"""Columns of cells, of whatever type a file has them in, as numbers and as moments."""

from typing import Any

import numpy as np
import pyarrow as pa

from ctrsink.config.times import iso_seconds
from ctrsink.dataset.arrow import PER_SECOND, pc

_NUMBER = r"^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_DAY = 86_400
_TYPES: Any = pa.types
_NUMERIC = (_TYPES.is_integer, _TYPES.is_floating, _TYPES.is_decimal, _TYPES.is_boolean, _TYPES.is_null)


def numbers(cells: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N], NaN where a cell is empty or no number; and bool [N], where it is none.

    Raises:
        TypeError: of a type that holds no numbers.
    """
    if _is_text(cells.type):
        text = pc.utf8_trim_whitespace(cells)
        valid = pc.match_substring_regex(text, _NUMBER)
        wrong = _flags(pc.and_(pc.invert(valid), pc.not_equal(text, "")))
        cells = pc.if_else(valid, text, pa.scalar(None, text.type))
    elif any(test(cells.type) for test in _NUMERIC):
        wrong = np.zeros(len(cells), bool)
    else:
        raise TypeError(f"must hold numbers, but it is of type {cells.type}")
    # Unsafe, as whole numbers that float64 rounds are no reason to refuse a column.
    return pc.cast(cells, pa.float64(), safe=False).to_numpy(zero_copy_only=False), wrong


def truth_as_numbers(texts: pa.Array) -> pa.Array:
    """`true` and `false`, in letters of any size, as 1 and 0; the others as they are."""
    words = pc.utf8_trim_whitespace(pc.utf8_lower(texts))
    return pc.if_else(pc.equal(words, "true"), "1", pc.if_else(pc.equal(words, "false"), "0", texts))


def moments(cells: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Whole seconds since 1970, rounded down: float64 [N], NaN where a cell is empty or no time; and bool [N], where it is none.

    Numbers are seconds. Dates are their midnight, and what names no time zone is UTC.

    Raises:
        TypeError: of a type that holds no times, or not exactly.
    """
    kind: Any = cells.type
    readable = np.zeros(len(cells), bool)
    if pa.types.is_timestamp(kind):
        return _whole(cells, 1, PER_SECOND[kind.unit]), readable
    if pa.types.is_date32(kind):
        return _whole(pc.cast(cells, pa.int32()), _DAY, 1), readable
    if pa.types.is_date64(kind):
        return _whole(cells, 1, PER_SECOND["ms"]), readable
    if _is_text(kind):
        return _written(cells)
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        raise TypeError(f"is of type {kind}, which is minutes off for times of today: write it as int64 or double")
    if pa.types.is_boolean(kind) or not any(test(kind) for test in _NUMERIC):
        raise TypeError(
            f"must hold seconds since 1970 or times, but it is of type {kind}: cast it to int64 seconds, a timestamp or a date"
        )
    return np.floor(numbers(cells)[0]), readable


def iso(second: int) -> str:
    """A moment as ISO 8601 writes it, such as 2024-05-31T23:59:59Z."""
    return f"{np.datetime64(second, 's')}Z"


def _is_text(kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _written(cells: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Of text: each cell a number of seconds, or a date or time in ISO 8601."""
    values, other = numbers(cells)
    values = np.floor(values)
    places = np.flatnonzero(other)
    found = [iso_seconds(text) for text in cells.take(pa.array(places)).to_pylist()]
    values[places] = [np.nan if second is None else second for second in found]
    other[places] = [second is None for second in found]
    return values, other


def _whole(cells: pa.Array, times: int, per: int) -> np.ndarray:
    """Integers multiplied and divided; the result is float64, NaN where there is none."""
    values = pc.fill_null(pc.cast(cells, pa.int64()), 0).to_numpy(zero_copy_only=False) * times // per
    return np.where(_flags(pc.is_null(cells)), np.nan, values.astype(np.float64))


def _flags(values: pa.Array) -> np.ndarray:
    return pc.fill_null(values, False).to_numpy(zero_copy_only=False)
