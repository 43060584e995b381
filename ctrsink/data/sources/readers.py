"""jsonl and parquet become RawRows, and a whole table is read by the ending of its name."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrsink.data.events import RawRows
from ctrsink.data.sources.delimited import read_csv
from ctrsink.data.sources.files import RangeFile, read_whole, size_of
from ctrsink.errors import InputError

ENDINGS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


def kind_of(uri: str) -> str:
    """`csv`, `jsonl` or `parquet`, by the ending of the name.

    Raises:
        InputError: it ends otherwise.
    """
    for ending, kind in ENDINGS.items():
        if uri.endswith(ending) or (kind != "parquet" and uri.endswith(f"{ending}.gz")):
            return kind
    raise InputError(f"{uri}: a table is a .csv, .jsonl or .parquet file (csv and jsonl also with .gz)")


def read_table(uri: str) -> RawRows:
    """Read a whole table by the ending of its name.

    Raises:
        InputError: the file is missing, empty, damaged, or of another kind.
    """
    kind = kind_of(uri)
    if kind == "csv":
        return read_csv(uri)
    if kind == "jsonl":
        return read_jsonl(uri, read_whole(uri))
    return read_row_groups(uri, open_parquet(uri))


def read_jsonl(uri: str, content: bytes, keep: Sequence[str] | None = None) -> RawRows:
    """An object a line into columns of strings, all or those to `keep`, where a missing one is null.

    Numbers become text as they were written, the entries of a list are joined by spaces.
    """
    records: list[dict[str, Any]] = []
    numbers: list[int] = []
    broken: list[tuple[int, str]] = []
    lines = content.removeprefix(b"\xef\xbb\xbf").splitlines()
    rows = [line for line in lines if line.strip()]
    for number, line in enumerate(rows, start=1):
        try:
            record = json.loads(line, parse_float=str, parse_int=str, parse_constant=_constant)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
            numbers.append(number)
        else:
            broken.append((number, "the line is not a JSON object"))
    names = keep or list(dict.fromkeys(name for record in records for name in record))
    table = pa.table({name: pa.array([_text(record.get(name)) for record in records], pa.string()) for name in names})
    return RawRows(uri, table, np.array(numbers, np.int64), 0 if len(rows) == len(lines) else None, broken)


def open_parquet(uri: str) -> pq.ParquetFile:
    """A parquet file from which row groups can be read.

    Raises:
        InputError: it is missing, empty or damaged.
    """
    try:
        # Nanoseconds in 64 bits end in the year 2262, those of INT96 do not: as seconds none is read as another time.
        return pq.ParquetFile(RangeFile(uri, size_of(uri)), pre_buffer=True, coerce_int96_timestamp_unit="s")
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(uri, error) from None


def read_row_groups(uri: str, file: pq.ParquetFile, groups: range | None = None, keep: Sequence[str] | None = None) -> RawRows:
    """Row groups of a parquet file, all or those named, with all columns or those to `keep`.

    Raises:
        InputError: it is damaged.
    """
    wanted = range(file.num_row_groups) if groups is None else groups
    try:
        table = file.read_row_groups(list(wanted), columns=None if keep is None else list(keep), use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(uri, error) from None
    plain = [c.cast(c.type.value_type) if pa.types.is_dictionary(c.type) else c for c in table.columns]
    return RawRows(uri, pa.Table.from_arrays(plain, names=table.column_names), np.arange(1, table.num_rows + 1))


def _damaged(uri: str, error: Exception) -> InputError:
    return InputError(f"{uri} is not a whole parquet file: {' '.join(str(error).split())}")


def _constant(name: str) -> str | None:
    return None if name == "NaN" else name  # what pandas and numpy write for an absent number


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return " ".join(_text(entry) or "" for entry in value)
    return json.dumps(value, ensure_ascii=False)
