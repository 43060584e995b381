"""A value becomes text in one way, wherever it stands: in a csv, jsonl or Parquet file, in a request, or in Python's hands."""

import datetime
import decimal
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from ctrsink.dataset.arrow import PER_SECOND, pc

# A number as JSON has it, but for whole ones, which are written one way already.
_NUMBER = r"^-?(0|[1-9][0-9]*)(\.[0-9]+([eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)$|^-0$"
_TRUTH = r"^(?i:true|false)$"
_DIGITS = 1e21  # whole numbers below this are written without an exponent, as JavaScript does
_FIRST_DAY, _LAST_DAY = -719_162, 2_932_896  # the years 1 to 9999, in days since 1970
_EXACT_BITS = {pa.float16(): 11, pa.float32(): 24, pa.float64(): 53}  # whole numbers up to 2^bits are told apart


def text(value: Any) -> str | None:
    """The text of a value of JSON's or Python's kinds; None where it is missing, as null and NaN are.

    A number is its shortest decimal form, the entries of a list are joined by spaces without those that are missing.

    Raises:
        ValueError: it has none, as an object; the message is the reason.
    """
    if hasattr(value, "tolist"):  # an array, or a number of one
        # What is 6.1 in fewer bits is 6.1 and not the double next to it, as in a column of that type.
        value = (value.astype(str).astype(float) if getattr(value, "dtype", None) == np.float32 else value).tolist()
    if value is None or isinstance(value, str):
        return value and _whole(value)
    if isinstance(value, bytes):
        return _decoded(value)
    if isinstance(value, list | tuple):
        return " ".join(entry for entry in map(text, value) if entry is not None)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return _digits(value)
    if isinstance(value, float | decimal.Decimal):
        return _number(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return column_texts(pa.array([value]))[0][0].as_py()
    kind = "an object" if isinstance(value, dict) else f"a value of type {type(value).__name__}"
    raise ValueError(f"{kind} is no text: give a text, a number or a list of them")


def id_text(value: Any) -> str | None:
    """The text of an id: as `text`, but a list is none, and a floating number is the whole one that it stands for.

    Raises:
        ValueError: it is no id.
    """
    if isinstance(value, list | dict):
        raise ValueError(f"{'a list' if isinstance(value, list) else 'an object'} is no id: ids are texts or whole numbers")
    if isinstance(value, bool):
        raise ValueError("a truth value is no id: ids are texts or whole numbers")
    if isinstance(value, float) and value == value and not is_exact(value, 53):
        raise ValueError(no_id(value, 53))
    if isinstance(value, decimal.Decimal) and value != value.to_integral_value():
        raise ValueError(f"{value} is no whole number: write ids as integers or as text")
    return text(value)


def cell_text(value: Any) -> str | None:
    """The text of a number or a moment: as `text`, but a list is none.

    Raises:
        ValueError: it has none.
    """
    if isinstance(value, list):
        raise ValueError("a list is neither a number nor a time")
    return text(value)


def is_exact(value: float, bits: int) -> bool:
    """Whether a floating number of so many bits stands for one whole number alone."""
    return value.is_integer() and abs(value) <= 2**bits


def no_id(value: float, bits: int) -> str:
    """Why a floating number is no id."""
    why = f"lies beyond 2^{bits}, where such numbers do not tell ids apart" if value.is_integer() else "is no whole number"
    return f"{value!r} is a floating-point number and {why}: write ids as integers or as text"


def column_texts(cells: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """The texts of a column (see `text`), null where there is none, and the rows whose value has none, with the reason."""
    kind = cells.type
    if isinstance(kind, pa.BaseExtensionType):
        return _one_by_one(cells, text)
    if pa.types.is_floating(kind):
        wide = pc.cast(cells, pa.float64())
        finite = pc.is_finite(wide)
        endless = _mask(pc.fill_null(pc.is_inf(wide), False))
        shortest = pc.cast(pc.if_else(finite, cells, pa.scalar(None, kind)), pa.string())
        return one_form(shortest), {row: _endless(wide[row].as_py()) for row in np.flatnonzero(endless).tolist()}
    if pa.types.is_null(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return pc.cast(cells, pa.string()), {}
    if _is_letters(kind):
        try:  # nobody looked yet whether it is UTF-8, where the file says that it is
            return pc.cast(pc.cast(cells, pa.large_binary()), pa.string()), {}
        except pa.ArrowInvalid:
            return _one_by_one(pc.cast(cells, pa.large_binary()), text)
    if pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_timestamp(kind):
        # In microseconds, as Python has them, and only where there are some.
        kind = pa.timestamp("us", kind.tz) if pa.types.is_timestamp(kind) else pa.time64("us") if pa.types.is_time(kind) else kind
        cells, wrong = _within_years(cells)
        try:
            written = pc.cast(pc.cast(cells, kind, safe=False), pa.string())
        except pa.ArrowInvalid as error:  # a time zone that nobody knows
            return pa.nulls(len(cells), pa.string()), {int(row): str(error) for row in np.flatnonzero(_mask(cells.is_valid()))}
        return pc.replace_substring_regex(written, r"\.0{6}", ""), wrong
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _joined(cells)
    return _one_by_one(cells, lambda value: text(dict(value) if value is not None and pa.types.is_map(kind) else value))


def column_ids(cells: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """The ids in a column, as `column_texts`; of floating numbers the whole ones that they stand for (see `id_text`).

    Raises:
        ValueError: nothing in a column of that type is an id.
    """
    kind = cells.type
    if isinstance(kind, pa.BaseExtensionType):
        return _one_by_one(cells, id_text)
    if pa.types.is_floating(kind):
        bits = _EXACT_BITS[kind]
        numbers = pc.cast(cells, pa.float64()).to_numpy(zero_copy_only=False)
        some = ~np.isnan(numbers)
        exact = some & (np.abs(numbers) <= 2**bits) & (np.floor(numbers) == numbers)
        whole = pa.array(np.where(exact, numbers, 0).astype(np.int64), mask=~exact)
        wrong = {row: no_id(float(numbers[row]), bits) for row in np.flatnonzero(some & ~exact).tolist()}
        return pc.cast(whole, pa.string()), wrong
    if pa.types.is_decimal(kind):
        return _one_by_one(cells, id_text)
    if pa.types.is_null(kind) or pa.types.is_integer(kind) or _is_letters(kind):
        return column_texts(cells)
    raise ValueError(f"must hold ids, but it is of type {kind}: write texts or whole numbers there")


def one_form(texts: pa.Array) -> pa.Array:
    """The same texts with each number and truth value written as `text` does it, and letters composed (Unicode's NFC).

    So a csv file, which has but texts, and a typed file or request give one text for one value.
    """
    texts = pc.utf8_normalize(texts, form="NFC")
    for pattern, form in ((_NUMBER, _finite_form), (_TRUTH, str.lower)):
        found = pc.fill_null(pc.match_substring_regex(texts, pattern), False)
        if pc.any(found).as_py():
            replaced = [form(written) for written in texts.filter(found).to_pylist()]
            texts = pc.replace_with_mask(texts, found, pa.array(replaced, pa.string()))
    return texts


def _finite_form(written: str) -> str:
    number = float(written)
    return written if np.isinf(number) else _shortest(number)


def _number(value: float | decimal.Decimal) -> str | None:
    if value != value:
        return None
    if isinstance(value, decimal.Decimal) and value.is_finite() and value == value.to_integral_value():
        return _digits(int(value))
    number = float(value)
    if np.isinf(number):
        raise ValueError(_endless(number))
    return _shortest(number)


def _shortest(number: float) -> str:
    return str(int(number)) if number.is_integer() and abs(number) < _DIGITS else repr(number)


def _digits(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # Python writes no more than some thousand digits
        raise ValueError("the number has too many digits: give it as a text") from None


def _endless(number: float) -> str:
    return f"{number!r} is not a finite number"


def _whole(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{value[error.start : error.end]!a} is half a surrogate pair, which no UTF-8 text can hold") from None
    return str(value)


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the bytes {value[error.start : error.start + 20]!r} are no UTF-8 text: convert them") from None


def _one_by_one(cells: pa.Array, convert: Callable[[Any], str | None]) -> tuple[pa.Array, dict[int, str]]:
    texts: list[str | None] = []
    wrong: dict[int, str] = {}
    for row, cell in enumerate(cells):
        try:
            texts.append(convert(cell.as_py()))
        except (ValueError, OverflowError) as error:  # the second of a moment or a span that Python cannot hold
            texts.append(None)
            wrong[row] = str(error)
    return pa.array(texts, pa.string()), wrong


def _within_years(cells: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """Moments without those outside of the years 1 to 9999, which no text names; and the rows of these, with the reason."""
    kind = cells.type
    if pa.types.is_time(kind):
        return cells, {}
    steps = pc.fill_null(pc.cast(pc.cast(cells, pa.int32()) if pa.types.is_date32(kind) else cells, pa.int64()), 0)
    per_day = 1 if pa.types.is_date32(kind) else 86_400 * PER_SECOND["ms" if pa.types.is_date64(kind) else kind.unit]
    days = steps.to_numpy(zero_copy_only=False) // per_day
    outside = (days < _FIRST_DAY) | (days > _LAST_DAY)
    if not outside.any():
        return cells, {}
    wrong = {int(row): "the moment lies outside of the years 1 to 9999" for row in np.flatnonzero(outside)}
    return pc.if_else(pa.array(outside), pa.scalar(None, kind), cells), wrong


def _joined(cells: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """The texts of a column of lists."""
    entries, wrong = column_texts(cells.flatten())
    rows = pc.list_parent_indices(cells).to_pylist()
    found: list[list[str] | None] = [[] if valid else None for valid in cells.is_valid().to_pylist()]
    for row, entry in zip(rows, entries.to_pylist(), strict=True):
        if entry is not None:
            found[row].append(entry)
    reasons = {rows[number]: reason for number, reason in reversed(wrong.items())}
    texts = [None if words is None or row in reasons else " ".join(words) for row, words in enumerate(found)]
    return pa.array(texts, pa.string()), reasons


def _is_letters(kind: pa.DataType) -> bool:
    kinds = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in kinds)


def _mask(values: pa.Array) -> np.ndarray:
    return values.to_numpy(zero_copy_only=False)
