"""Where files of requests are cut: the same blocks whoever scores them, each a part of the output."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ctrsink.errors import InputError
from ctrsink.prepare.sources.cut import cut_lines
from ctrsink.prepare.sources.readers import open_parquet
from ctrsink.scoring.files import RequestFile
from ctrsink.scoring.packed import unpacked_lines
from ctrsink.scoring.rows import check_schema

_VALUE_BYTES = (
    16  # a value of a request as JSON, about: what a dictionary of Parquet packs into a few bits is as large again in use
)


@dataclass(frozen=True)
class Block:
    """A range of a file's requests."""

    file: int
    """Its number among the files."""
    start: int
    end: int
    """Bytes [start, end) of lines, unpacked; rows of Parquet."""
    bytes: int
    """How much it is, about, as JSON."""
    line: int | None = None
    """The number of its first line, from 0; None: it was not counted, as that would take reading the file."""
    last: bool = False
    """Nothing follows in the file."""


def cut_files(files: list[RequestFile], block_bytes: int) -> list[Block]:
    """Blocks of about `block_bytes`, in the order of the files; lines and rows are never cut.

    Raises:
        InputError: a file is damaged, or there is no request.
    """
    blocks: list[Block] = []
    for number, file in enumerate(files):
        of_file = list(_cut(number, file, block_bytes))
        blocks += [*of_file[:-1], *(replace(block, last=True) for block in of_file[-1:])]
    if not blocks:
        raise InputError(f"{files[0].uri} is empty: give requests")
    return blocks


def _cut(number: int, file: RequestFile, block_bytes: int) -> Iterator[Block]:
    if file.kind == "parquet":
        yield from _cut_rows(number, file, block_bytes)
    elif file.packed:
        yield from _cut_packed(number, file, block_bytes)
    else:
        for start, end in cut_lines(file.uri, 0, file.bytes, block_bytes):
            yield Block(number, start, end, end - start, None if start else 0)


def _cut_rows(number: int, file: RequestFile, block_bytes: int) -> Iterator[Block]:
    """Each row group in pieces of as many rows."""
    opened = open_parquet(file.uri)
    check_schema(opened.schema_arrow, file.uri)
    metadata, first = opened.metadata, 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        values = sum(group.column(column).num_values for column in range(group.num_columns))
        size = max(group.total_byte_size, values * _VALUE_BYTES)
        step = max(1, math.ceil(group.num_rows / max(1, math.ceil(size / block_bytes))))
        for start in range(0, group.num_rows, step):
            end = min(start + step, group.num_rows)
            yield Block(number, first + start, first + end, size * (end - start) // group.num_rows)
        first += group.num_rows


def _cut_packed(number: int, file: RequestFile, block_bytes: int) -> Iterator[Block]:
    """Reads the file: nobody knows where its lines end before it is unpacked."""
    start = at = line = lines = 0
    for text in unpacked_lines(file.uri, file.bytes):
        at, lines = at + len(text), lines + 1
        if at - start >= block_bytes:
            yield Block(number, start, at, at - start, line)
            start, line = at, lines
    if at > start:
        yield Block(number, start, at, at - start, line)
