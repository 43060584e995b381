"""Blocks of requests as a process reads them: one behind another from an open file, so that none is read twice for the next."""

import gzip
from collections.abc import Iterator

import pyarrow as pa

from ctrsink.errors import InputError
from ctrsink.prepare.sources.files import read_part
from ctrsink.prepare.sources.readers import damaged, open_parquet
from ctrsink.request_lines import RequestLine, parse_lines
from ctrsink.scoring.blocks import Block
from ctrsink.scoring.files import RequestFile
from ctrsink.scoring.packed import open_packed, whole
from ctrsink.scoring.rows import id_type, trees

_PIECE = 8 << 20
_COLUMN_BUFFER = 1 << 18  # bytes
_BATCH = 64  # rows


def common_id_type(files: list[RequestFile]) -> pa.DataType:
    """That of all requests' ids, as rows of Parquet are to hold it: text, unless all files are Parquet and agree."""
    if any(file.kind != "parquet" for file in files):
        return pa.string()
    kinds = {id_type(open_parquet(file.uri).schema_arrow) for file in files}
    return kinds.pop() if len(kinds) == 1 else pa.string()


class Reader:
    """Requests of the blocks of `files`; blocks in ascending order cost one pass over what cannot be read from its middle."""

    def __init__(self, files: list[RequestFile]) -> None:
        self._files = files
        self._packed: _Packed | None = None
        self._rows: _Rows | None = None
        self._counted = (-1, 0, 0)  # of this file the bytes up to there hold so many lines

    def read(self, block: Block) -> list[RequestLine]:
        """The block's requests. `where` counts lines from the block's start, while nobody counted those before it: see `place`.

        Raises:
            InputError: the file is gone, damaged, or another one by now.
        """
        try:
            return self._read(block)
        except BaseException:  # what was interrupted is not where it says: whoever tries again starts anew
            self._packed = self._rows = None
            raise

    def _read(self, block: Block) -> list[RequestLine]:
        file = self._files[block.file]
        if file.kind == "parquet":
            rows = self._table(block).read(block.start, block.end)
            return [RequestLine(f"{file.uri}, row {number}", tree) for number, tree in enumerate(rows, block.start + 1)]
        if file.packed:
            if self._packed is None or self._packed.file != file or self._packed.position > block.start:
                self._packed = _Packed(file)
            content = self._packed.read(block.start, block.end)
        else:
            content = read_part(file.uri, block.start, block.end)
        return parse_lines(content, file.uri, block.line or 0, block.last)

    def place(self, where: str, block: Block) -> str:
        """`where` with the number that the line has in its file."""
        if block.line is not None or self._files[block.file].kind == "parquet":
            return where
        file, _, number = where.rpartition(" ")
        return f"{file} {self._lines_before(block) + int(number)}"

    def _lines_before(self, block: Block) -> int:
        known, at, lines = self._counted
        if known != block.file or at > block.start:
            at, lines = 0, 0
        while at < block.start:
            piece = read_part(self._files[block.file].uri, at, min(at + _PIECE, block.start))
            at, lines = at + len(piece), lines + piece.count(b"\n")
        self._counted = (block.file, at, lines)
        return lines

    def _table(self, block: Block) -> "_Rows":
        file = self._files[block.file]
        if self._rows is None or self._rows.file != file:
            self._rows = _Rows(file)
        return self._rows


class _Packed:
    """A gzip file at some byte of its content."""

    def __init__(self, file: RequestFile) -> None:
        self.file, self.position = file, 0
        self._stream: gzip.GzipFile = open_packed(file.uri, file.bytes)

    def read(self, start: int, end: int) -> bytes:
        with whole(self.file.uri):
            while self.position < start:
                self._take(min(_PIECE, start - self.position))
            return self._take(end - start)

    def _take(self, size: int) -> bytes:
        content = self._stream.read(size)
        if len(content) != size:
            raise InputError(f"{self.file.uri} became shorter while it was read: leave the requests unchanged")
        self.position += size
        return content


class _Rows:
    """A Parquet file at some row."""

    def __init__(self, file: RequestFile) -> None:
        self.file, self._position = file, 0
        self._opened = open_parquet(file.uri, _COLUMN_BUFFER)
        metadata = self._opened.metadata
        self._groups = [0]
        for number in range(metadata.num_row_groups):
            self._groups.append(self._groups[-1] + metadata.row_group(number).num_rows)
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None  # what is left of the one at the position

    def read(self, start: int, end: int) -> list[object]:
        """Rows of one row group."""
        group = max(number for number, first in enumerate(self._groups[:-1]) if first <= start)
        if group != self._group or self._position > start:
            self._group, self._position, self._batch = group, self._groups[group], None
            self._batches = self._opened.iter_batches(_BATCH, row_groups=[group], use_threads=False)
        found: list[object] = []
        try:
            while self._position < end:
                batch = next(self._batches) if self._batch is None else self._batch
                wanted = (start if self._position < start else end) - self._position
                taken, left = batch.slice(0, wanted), batch.slice(wanted)
                if self._position >= start:
                    found += trees(taken, self.file.uri)
                self._position += len(taken)
                self._batch = left if len(left) else None
        except (pa.ArrowException, OSError) as error:
            raise damaged(self.file.uri, error) from None
        return found
