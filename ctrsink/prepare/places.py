"""A row of a block becomes a row of its file."""

from ctrsink.prepare.check_rows import Problem, place


class Places:
    """Counts the rows of the blocks, which come in their order."""

    def __init__(self) -> None:
        self._file, self._rows = "", 0
        self._header_lines: int | None = None

    def next(self, file: str, rows: int, header_lines: int | None, problem: Problem | None) -> str:
        """Where in its file the first problem of the next block is, and what; empty where there is none.

        Args:
            rows: of the file, in the block.
            header_lines: see RawRows; a file has line numbers as long as each of its blocks has.
        """
        if file != self._file:
            self._file, self._rows, self._header_lines = file, 0, header_lines
        elif header_lines is None:
            self._header_lines = None
        before, self._rows = self._rows, self._rows + rows
        return place(file, before + problem.row, self._header_lines) + problem.what if problem else ""
