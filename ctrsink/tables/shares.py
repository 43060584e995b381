"""Which rows of a table lie on which rank.

Contiguous ranges, not `row % world`: rows that are wanted, once sorted, are in the order of their owners already, and another
number of ranks reads whole stretches of the files. Ranges are evenly busy because `hashing.rows_of` puts neighbouring ids far
apart.
"""

from typing import NamedTuple

import torch


class Share(NamedTuple):
    """What one rank holds of a table."""

    rows: int
    """Of the whole table."""
    values: torch.Tensor
    """fp32 [n, D], of the own rows."""
    squares: torch.Tensor
    """fp32 [n], the optimiser's state."""


def share(rows: int, rank: int, world: int) -> range:
    """The rows of a rank; shares differ by one row at most, and are empty where there are more ranks than rows."""
    return range(rank * rows // world, (rank + 1) * rows // world)


def counts_by_owner(named: torch.Tensor, rows: int, world: int) -> list[int]:
    """How many of the rows `named`, int64 [n] and ascending, each rank owns."""
    ends = torch.tensor([share(rows, rank, world).stop for rank in range(world)], device=named.device)
    return torch.searchsorted(named, ends).diff(prepend=ends.new_zeros(1)).tolist()


def bytes_needed(rows: int, width: int, world: int) -> int:
    """Bytes of a table that the fullest of `world` ranks holds: values and the optimiser's number of each row, fp32.

    A step adds some copies of the rows that it touches: about `30 * width` bytes for each.
    """
    return 4 * (width + 1) * -(-rows // world)
