"""Which rows of a table an id names: a pure function, so that a model names the same rows wherever it runs."""

import math
from functools import lru_cache

import torch

MOST_ROWS = 2**31


def rows_of(ids: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows `1 .. rows - 1` of a table, int64 [...]; row 0, of all that is unknown, where an id is negative.

    It steps around the table, so ids below `rows - 1` have a row of their own each, and neighbours lie far apart; ids beyond that
    share rows, evenly where they are hashes themselves. It depends on no seed, which an exported model would have to carry along.

    Args:
        ids: int64 [...].
        rows: of the table, 2 to MOST_ROWS.
    """
    if not 2 <= rows <= MOST_ROWS:
        raise ValueError(f"a table of {rows} rows: rows are 2 to {MOST_ROWS}")
    count = rows - 1
    return torch.where(ids < 0, 0, 1 + ids.remainder(count).mul(_stride(count)).remainder(count))


@lru_cache
def _stride(count: int) -> int:
    """A step around `count` places that visits all of them, near the golden section of the circle (Knuth, TAOCP 3, 6.4)."""
    stride = max(1, int(count * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride
