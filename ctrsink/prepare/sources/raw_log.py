"""What every source offers: its item table, and its event log as blocks that can be read apart from each other."""

from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from ctrsink.config.data import ColumnSpec
from ctrsink.prepare.check_rows import RawRows


@dataclass(frozen=True)
class Block:
    """A piece of one file of the log; blocks in their order are the log in its order."""

    file: str
    """URI."""
    start: int
    end: int
    """Bytes [start, end) of the file, cut at row boundaries; row groups of a parquet file."""
    form: str = ""
    """What the source needs to know to read it, such as the name of a layout."""


class RawLog(Protocol):
    """A raw log; plain data that can be pickled, so that a task on another machine can read blocks of it.

    What is read does not depend on the cut: the rows of all blocks, in their order, are the same for any `block_bytes`.
    """

    @property
    def columns(self) -> ColumnSpec:
        """Names of the columns that `read` gives."""
        ...

    def items(self) -> pa.Table | None:
        """The checked item table (`item`, unique, and text fields; see check_items), or None where there are only the log's ids.

        Raises:
            InputError: it is missing or cannot be used.
        """
        ...

    def blocks(self, block_bytes: int) -> list[Block]:
        """The log cut into blocks of about `block_bytes` (the last of a file smaller), in the order of the log; at least one.

        Raises:
            InputError: the log is missing or empty, or of another layout.
        """
        ...

    def read(self, block: Block) -> RawRows:
        """The rows of a block, of which there may be none; `numbers` count from 1 within the block.

        `header_lines` is that of the file: where no block before it has None, the line of a row is its number in the file plus
        this. A row may give several events, all with its number, or none.

        Raises:
            InputError: it cannot be read as this source's layout.
        """
        ...
