"""Which rows of a table an id names: a pure function, so that a model names the same rows wherever it runs."""

import math
from functools import lru_cache

import torch

MOST_ROWS = 2**31


def rows_of(ids: torch.Tensor, rows: int, hashes: int = 1) -> torch.Tensor:
    """Rows `1 .. rows - 1` of a table, int64 [..., hashes]; row 0, of all that is unknown, where an id is negative.

    The first hash steps around the table, so ids below `rows - 1` have a row of their own each, and neighbours lie far apart; ids
    beyond that share rows, evenly where they are hashes themselves. The second one is splitmix64, so two ids that share their
    first row do not share the second: the sum of both rows tells them apart (hash embeddings, arXiv 1709.03933, section 3; there
    the sum is weighted, here it is not). Neither depends on a seed, which an exported model would have to carry along.

    Args:
        ids: int64 [...].
        rows: of the table, 2 to MOST_ROWS.
        hashes: 1 or 2.
    """
    if not 2 <= rows <= MOST_ROWS or hashes not in (1, 2):
        raise ValueError(f"a table of {rows} rows with {hashes} hashes: rows are 2 to {MOST_ROWS}, hashes 1 or 2")
    count = rows - 1
    found = [ids.remainder(count).mul(_stride(count)).remainder(count)]
    if hashes == 2:
        found.append((splitmix(ids) & (2**63 - 1)).remainder(count))
    return torch.where(ids[..., None] < 0, 0, 1 + torch.stack(found, -1))


def splitmix(values: torch.Tensor) -> torch.Tensor:
    """The 64 bits of `features.mix64.mix64(values)`, as int64: integers of PyTorch wrap around as unsigned ones do."""
    out = values + _signed(0x9E3779B97F4A7C15)
    out = (out ^ _shifted(out, 30)) * _signed(0xBF58476D1CE4E5B9)
    out = (out ^ _shifted(out, 27)) * _signed(0x94D049BB133111EB)
    return out ^ _shifted(out, 31)


@lru_cache
def _stride(count: int) -> int:
    """A step around `count` places that visits all of them, near the golden section of the circle (Knuth, TAOCP 3, 6.4)."""
    stride = max(1, int(count * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shifted(values: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, with zeros in front, not the sign."""
    return (values >> by) & (2 ** (64 - by) - 1)
