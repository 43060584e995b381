"""Values of a column as numbers: equal exactly where column and value are equal."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache


def field_ids(column: str, separator: str | None, cell: str) -> list[int]:
    """The values in one cell, ascending, each once; none where the cell is blank."""
    values: Iterable[str] = [cell] if separator is None else cell.split(separator)
    return sorted({hashed(column, value.strip()) for value in values if value.strip()})


@lru_cache(maxsize=2**16)
def hashed(column: str, value: str) -> int:
    """63 bits of a hash: no table of values has to be kept, and a new one has a number too."""
    return int.from_bytes(hashlib.sha256(f"{column}\0{value}".encode()).digest()[:8], "big") >> 1
