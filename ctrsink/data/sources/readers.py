"""csv, jsonl and parquet become RawRows: text stays text, so that a bad cell can be named by its row."""

import csv
import gzip
import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from ctrsink import storage
from ctrsink.data.events import RawRows
from ctrsink.errors import InputError


def read_content(uri: str) -> bytes:
    """The content of a file of the user's, unpacked where its name ends in .gz.

    Raises:
        InputError: it is missing, empty or no gzip file.
    """
    try:
        content = storage.read_bytes(uri)
        if uri.endswith(".gz"):
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise InputError(f"{uri} does not exist: correct the path") from None
    except (gzip.BadGzipFile, EOFError):
        raise InputError(f"{uri} is not a whole gzip file") from None
    if not content.strip():
        raise InputError(f"{uri} is empty")
    return content


def read_rows(uri: str) -> RawRows:
    """Read a table by the ending of its name.

    Raises:
        InputError: the file is missing, empty, damaged, or of another kind.
    """
    name = uri.removesuffix(".gz")
    if name.endswith(".csv"):
        return read_delimited(uri, read_content(uri), ",")
    if name.endswith((".jsonl", ".ndjson")):
        return _read_jsonl(uri, read_content(uri))
    if name.endswith(".parquet"):
        return _read_parquet(uri, read_content(uri))
    raise InputError(f"{uri}: a table is a .csv, .jsonl or .parquet file (csv and jsonl also with .gz)")


def read_delimited(uri: str, content: bytes, delimiter: str, names: list[str] | None = None, quoted: bool = True) -> RawRows:
    """Split UTF-8 text into columns of strings; without `names` the first line is the header. An empty cell is null."""
    header = names or next(csv.reader([_first_line(uri, content)], delimiter=delimiter))
    broken: list[tuple[int, str]] = []
    header_lines = 0 if names else 1

    def collect(row: Any) -> str:
        broken.append((row.number - header_lines, f"{row.actual_columns} columns instead of {row.expected_columns}"))
        return "skip"

    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(content),
            pyarrow.csv.ReadOptions(column_names=names, use_threads=False),  # with threads rows have no number
            pyarrow.csv.ParseOptions(
                delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted, invalid_row_handler=collect
            ),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid as error:
        raise InputError(f"{uri} cannot be read as text in columns: {_line(error)}") from None
    rows = table.num_rows + len(broken)
    # Cells that span lines, or empty lines, move rows away from lines: then only rows are counted.
    is_line = content.rstrip(b"\r\n").count(b"\n") + 1 == rows + header_lines
    numbers = np.setdiff1d(np.arange(1, rows + 1), [n for n, _ in broken])
    return RawRows(uri, table, numbers, header_lines if is_line else None, broken)


def _read_jsonl(uri: str, content: bytes) -> RawRows:
    records: list[dict[str, Any]] = []
    numbers: list[int] = []
    broken: list[tuple[int, str]] = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
            numbers.append(number)
        else:
            broken.append((number, "the line is not a JSON object"))
    if not records:
        raise InputError(f"{uri}, line {broken[0][0]}: {broken[0][1]}, and no other line is")
    names = list(dict.fromkeys(name for record in records for name in record))
    table = pa.table({name: _column([record.get(name) for record in records]) for name in names})
    return RawRows(uri, table, np.array(numbers, np.int64), 0, broken)


def _read_parquet(uri: str, content: bytes) -> RawRows:
    try:
        table = pq.read_table(io.BytesIO(content))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{uri} is not a whole parquet file: {_line(error)}") from None
    plain = [c.cast(c.type.value_type) if pa.types.is_dictionary(c.type) else c for c in table.columns]
    return RawRows(uri, pa.Table.from_arrays(plain, names=table.column_names), np.arange(1, table.num_rows + 1))


def _column(values: list[Any]) -> pa.Array:
    """Typed where all values agree, else text: the check of the events then finds the one that is different."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([v if v is None or isinstance(v, str) else json.dumps(v) for v in values], pa.string())


def _first_line(uri: str, content: bytes) -> str:
    try:
        return content.lstrip().split(b"\n", 1)[0].decode("utf-8-sig").rstrip("\r")
    except UnicodeDecodeError:
        raise InputError(f"{uri} is not UTF-8 text: convert it") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
