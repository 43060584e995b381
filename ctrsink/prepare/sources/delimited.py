"""Text in columns becomes RawRows: every cell stays text, so that a bad one can be named by its row."""

import csv
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from ctrsink.errors import InputError
from ctrsink.prepare.check_rows import RawRows
from ctrsink.prepare.sources.cut import cut_lines, cut_quoted, open_quote, row_end
from ctrsink.prepare.sources.files import HEAD, read_head, read_part, read_whole, require_columns, size_of
from ctrsink.prepare.sources.raw_log import Block

_BEFORE_HEADER = re.compile(rb"(?:\xef\xbb\xbf)?\s*")  # a byte order mark, empty lines


def csv_blocks(uri: str, block_bytes: int, wanted: Sequence[str], quoted: bool = True) -> list[Block]:
    """Cut a csv file with a header; the header becomes the blocks' form. A packed file is one block, one without rows is none.

    Raises:
        InputError: it is missing or empty, or has not exactly one column of each `wanted` name.
    """
    header = _header(uri)
    names = _names(header)
    require_columns(uri, names, wanted)
    start, size = len(header.encode()), size_of(uri)
    if uri.endswith(".gz"):
        return [Block(uri, 0, size, header)]
    cut = cut_quoted if quoted else cut_lines
    return [Block(uri, first, end, header) for first, end in cut(uri, start, size, block_bytes)]


def read_csv_block(block: Block, wanted: Sequence[str], quoted: bool = True) -> RawRows:
    """The `wanted` columns of a block that csv_blocks made.

    Raises:
        InputError: it cannot be read as csv.
    """
    if block.file.endswith(".gz"):
        content = read_whole(block.file)[len(block.form.encode()) :]
    else:
        content = read_part(block.file, block.start, block.end)
    lines = block.form.count("\n")
    return read_delimited(block.file, content, ",", _names(block.form), header_lines=lines, quoted=quoted, keep=wanted)


def read_csv(uri: str) -> RawRows:
    """A whole csv file with a header, packed or not.

    Raises:
        InputError: it is missing, empty or cannot be read as csv.
    """
    header, content = _header(uri), read_whole(uri)
    rows = content[len(header.encode()) :]
    return read_delimited(uri, rows, ",", _names(header), header_lines=header.count("\n"), quoted=True)


def read_delimited(
    uri: str,
    content: bytes,
    delimiter: str,
    names: Sequence[str],
    header_lines: int = 0,
    quoted: bool = False,
    keep: Sequence[str] | None = None,
) -> RawRows:
    """Split UTF-8 text without a header into columns of strings, all or those to `keep`. An empty cell is null.

    Raises:
        InputError: it is no UTF-8 text, or a quote is left open.
    """
    at = open_quote(content) if quoted and b'"' in content else None
    if at is not None:
        start = content[at : at + 40].decode(errors="replace")
        raise InputError(f"{uri}: a quote is never closed, that before {' '.join(start.split())[1:]!r}: close or remove it")
    kept = list(keep or names)
    broken: list[tuple[int, str]] = []

    def collect(row: Any) -> str:
        broken.append((row.number, f"{row.actual_columns} columns instead of {row.expected_columns}"))
        return "skip"

    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(content or b"\n"),
            pyarrow.csv.ReadOptions(
                column_names=list(names),
                use_threads=False,  # with threads rows have no number
                block_size=min(max(len(content), 1), 1 << 24),  # a row may not be longer
            ),
            pyarrow.csv.ParseOptions(
                delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted, invalid_row_handler=collect
            ),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(kept, pa.string()),
                include_columns=kept,
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid as error:
        raise InputError(f"{uri} cannot be read as text in columns: {' '.join(str(error).split())}") from None
    rows = table.num_rows + len(broken)
    # Cells that span lines, or empty lines, move rows away from lines: then only rows are counted.
    lines = content.count(b"\n") + (not content.endswith(b"\n") and bool(content))
    numbers = np.delete(np.arange(1, rows + 1), np.array([number - 1 for number, _ in broken], np.int64))
    return RawRows(uri, table, numbers, header_lines if lines == rows else None, broken)


def _header(uri: str) -> str:
    """Everything up to the first row."""
    head = read_head(uri)
    found = _BEFORE_HEADER.match(head)
    start = found.end() if found else 0
    end = row_end(head[start:], 0)
    if end is None and len(head) >= HEAD:
        raise InputError(f"{uri} has no header: its first row does not end within {HEAD >> 20} MiB")
    header = head[: len(head) if end is None else start + end]
    if b"\r" in header.strip().replace(b"\r\n", b""):
        raise InputError(f"{uri}: a line ends with a carriage return alone: save it with line feeds")
    try:
        return header.decode()
    except UnicodeDecodeError:
        raise InputError(f"{uri} is not UTF-8 text: convert it") from None


def _names(header: str) -> list[str]:
    return next(csv.reader([header.lstrip("\ufeff \t\r\n")]))
