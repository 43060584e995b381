"""Where a text file may be cut into blocks: always behind a row, also where a quoted cell holds line breaks."""

import re
from collections.abc import Callable

from ctrsink.errors import InputError
from ctrsink.prepare.sources.files import read_part

LONGEST_ROW = 64 << 20  # bytes; where no row ends for longer, a quote was left open
_STEP = 1 << 16  # bytes that are read, at first, in search of the end of a row

# As the csv reader has it: a quote opens a cell only where the cell begins, and within it two quotes stand for one.
_CELL = rb'(?<![^,\r\n])"[^"]*(?:""[^"]*)*"(?!")'
_QUOTED_CELL = re.compile(_CELL)
# No possessive quantifier, which Python before 3.11.5 gets wrong around alternatives; so many pieces at a time, because each is
# remembered until the match is over.
_CLOSED = re.compile(rb'(?:[^"]+|' + _CELL + rb'|(?<=[^,\r\n])"){1,4096}')


def cut_lines(uri: str, start: int, size: int, block_bytes: int) -> list[tuple[int, int]]:
    """Bytes [start, size) of a text without quotes, in pieces that end with the first line at or behind `block_bytes`."""
    return _cut(uri, start, size, block_bytes, 1, _line_end)


def cut_quoted(uri: str, start: int, size: int, block_bytes: int) -> list[tuple[int, int]]:
    """The same for a csv file whose cells may hold line breaks in quotes; reads it whole where it has more than one piece.

    Raises:
        InputError: a quote is left open.
    """
    return _cut(uri, start, size, block_bytes, block_bytes, row_end)


def row_end(text: bytes, at: int) -> int | None:
    """Where the first row ends that ends at or behind `at` in csv text from the start of a row on; None where no row does."""
    known = 0  # outside of quotes
    while end := text.find(b"\n", max(at - 1, 0)) + 1:
        known = _closed_until(text, known, end)
        if known == end:
            return end
        cell = _QUOTED_CELL.match(text, known)
        if cell is None:
            return None
        known, at = cell.end(), cell.end() + 1
    return None


def open_quote(text: bytes) -> int | None:
    """Where the quote stands that is never closed in csv text from the start of a row on; None where there is none."""
    end = _closed_until(text, 0, len(text))
    return None if end == len(text) else end


def _closed_until(text: bytes, start: int, end: int) -> int:
    while found := _CLOSED.match(text, start, end):
        start = found.end()
    return start


def _line_end(text: bytes, at: int) -> int | None:
    return text.find(b"\n", max(at - 1, 0)) + 1 or None


def _cut(
    uri: str, start: int, size: int, block_bytes: int, context: int, find: Callable[[bytes, int], int | None]
) -> list[tuple[int, int]]:
    """`context`: how many bytes before the wanted place `find` has to see."""
    pieces: list[tuple[int, int]] = []
    while size - start > block_bytes:
        first = start + block_bytes - context
        end = _search(uri, first, context, size, find)
        pieces.append((start, end))
        start = end
    return [*pieces, (start, size)] if start < size else pieces


def _search(uri: str, first: int, at: int, size: int, find: Callable[[bytes, int], int | None]) -> int:
    """The end of the row at or behind `first + at`; the file's where no row ends before."""
    length = at + _STEP
    while True:
        text = read_part(uri, first, min(first + length, size))
        end = find(text, at)
        if end is not None:
            return first + end
        if first + length >= size:
            return size
        if length > at + LONGEST_ROW:
            raise InputError(
                f"{uri}: no row ends in {LONGEST_ROW >> 20} MiB behind byte {first + at}: close the quote that is open"
            )
        length += length
