"""jsonl and parquet become RawRows, and a whole table is read by the ending of its name."""

import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrsink import strict_json
from ctrsink.dataset.values import cell_text, id_text, text
from ctrsink.errors import InputError
from ctrsink.prepare.check_rows import RawRows
from ctrsink.prepare.sources.delimited import read_csv
from ctrsink.prepare.sources.files import RangeFile, read_whole, size_of

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


def read_table(uri: str, ids: Collection[str] = ()) -> RawRows:
    """Read a whole table by the ending of its name; `ids` are the columns of ids in it.

    Raises:
        InputError: the file is missing, empty, damaged, or of another kind.
    """
    kind = kind_of(uri)
    if kind == "csv":
        return read_csv(uri)
    if kind == "jsonl":
        return read_jsonl(uri, read_whole(uri), ids=ids)
    return read_row_groups(uri, open_parquet(uri))


def read_jsonl(uri: str, content: bytes, keep: Sequence[str] | None = None, ids: Collection[str] = ()) -> RawRows:
    """An object a line into columns of strings (see values.text), all or those to `keep`, where a missing one is null.

    `ids` are the columns of ids, which are read by values.id_text. Where some are to be kept, the others are numbers and moments.
    """
    records: list[dict[str, Any]] = []
    numbers: list[int] = []
    broken: list[tuple[int, str]] = []
    lines = content.removeprefix(b"\xef\xbb\xbf").splitlines()
    rows = [line for line in lines if line.strip()]
    for number, line in enumerate(rows, start=1):
        problem = "the line is not a JSON object"
        try:
            record = json.loads(line, object_pairs_hook=strict_json.once)
        except strict_json.Twice as error:
            record, problem = None, str(error)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
            numbers.append(number)
        else:
            broken.append((number, problem))
    # A name that is no text is one that nobody can ask for.
    names = keep or list(dict.fromkeys(name for record in records for name in record if _is_text(name)))
    columns: dict[str, pa.Array] = {}
    wrong: dict[str, dict[int, str]] = {}
    floats: dict[str, dict[int, str]] = {}
    for name in names:
        convert, cells = id_text if name in ids else text if keep is None else cell_text, []
        for row, record in enumerate(records):
            value = record.get(name)
            try:
                cells.append(convert(value))
            except ValueError as error:
                cells.append(None)
                wrong.setdefault(name, {})[row] = str(error)
            if name in ids and isinstance(value, float) and cells[-1] is not None:
                floats.setdefault(name, {})[row] = repr(value)
        columns[name] = pa.array(cells, pa.string())
    header_lines = 0 if len(rows) == len(lines) else None
    return RawRows(uri, pa.table(columns), np.array(numbers, np.int64), header_lines, broken, wrong=wrong, floats=floats)


def open_parquet(uri: str, buffer_bytes: int = 0) -> pq.ParquetFile:
    """A parquet file from which row groups can be read.

    Args:
        buffer_bytes: of each column that is held of a row group which is read in batches; 0: a row group is fetched whole.

    Raises:
        InputError: it is missing, empty or damaged.
    """
    try:
        # Nanoseconds in 64 bits end in the year 2262, those of INT96 do not: as seconds none is read as another time.
        return pq.ParquetFile(
            RangeFile(uri, size_of(uri)),
            buffer_size=buffer_bytes,
            pre_buffer=not buffer_bytes,
            coerce_int96_timestamp_unit="s",
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise damaged(uri, error) from None


def read_row_groups(uri: str, file: pq.ParquetFile, groups: range | None = None, keep: Sequence[str] | None = None) -> RawRows:
    """Row groups of a parquet file, all or those named, with all columns or those to `keep`.

    Raises:
        InputError: it is damaged.
    """
    wanted = range(file.num_row_groups) if groups is None else groups
    try:
        table = file.read_row_groups(list(wanted), columns=None if keep is None else list(keep), use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise damaged(uri, error) from None
    plain = [c.cast(c.type.value_type) if pa.types.is_dictionary(c.type) else c for c in table.columns]
    return RawRows(uri, pa.Table.from_arrays(plain, names=table.column_names), np.arange(1, table.num_rows + 1))


def _is_text(name: str) -> bool:
    try:
        text(name)
    except ValueError:
        return False
    return True


def damaged(uri: str, error: Exception) -> InputError:
    """What is told of a parquet file that cannot be read to its end."""
    return InputError(f"{uri} is not a whole parquet file: {' '.join(str(error).split())}")
