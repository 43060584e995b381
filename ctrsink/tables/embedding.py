"""What a family's module looks ids up with."""

from collections.abc import Mapping

import torch
from torch import nn

from ctrsink.dist import Topology
from ctrsink.errors import InputError
from ctrsink.tables.files import folder_of
from ctrsink.tables.hashing import rows_of
from ctrsink.tables.shares import Share
from ctrsink.tables.table import RowTable

_AT_ONCE = 2**16


class ShardedEmbedding(nn.Module):
    """`table[rows_of(id)]`; without parameters: the engine steps its `table`, see RowTable.

    The values at the start depend on the state of torch's generator, as those of any module do; it must be the same on all ranks.

    Args:
        rows: of the table, whatever the number of ids; row 0 is for what is unknown.
        width: D.
        std: standard deviation of the vectors at the start.
    """

    def __init__(self, rows: int, width: int, std: float = 1.0) -> None:
        super().__init__()
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.table = RowTable(rows, width, std, seed)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [...], negative where unknown -> fp32 [..., D]. Collective: every rank must call it equally often."""
        return self.table.lookup(rows_of(ids, self.table.rows))

    @torch.no_grad()
    def vectors(self, ids: range) -> torch.Tensor:
        """[len(ids), D] on the CPU, of neighbouring ids: a table of its own for a plain lookup. In one process."""
        found = torch.empty(len(ids), self.table.width)
        for first in range(0, len(ids), _AT_ONCE):
            part = ids[first : first + _AT_ONCE]
            found[first : first + len(part)] = self(torch.arange(part.start, part.stop))
        return found

    def extra_repr(self) -> str:
        return f"{self.table.rows}, {self.table.width}"


def tables_of(module: nn.Module) -> dict[str, RowTable]:
    """The tables that a module looks up in, by the names of its parts that do."""
    return {name: part.table for name, part in module.named_modules() if isinstance(part, ShardedEmbedding)}


def share_out(module: nn.Module, topology: Topology, held: Mapping[str, Share] | None) -> dict[str, RowTable]:
    """Give this rank its rows of each table of a module; returns the tables by name.

    Args:
        held: their values and state, by `folder_of` the name; None: they start with those of their seed.

    Raises:
        InputError: `held` is of other tables.
    """
    tables = tables_of(module)
    for table in tables.values():
        table.place(topology)
    if held is None:
        return tables
    places = {folder_of(name): name for name in tables}
    if odd := sorted(held.keys() ^ places.keys()):
        where = "there and not here" if odd[0] in held else "here and not there"
        raise InputError(f"the checkpoint does not fit the model: the table {odd[0]} is {where}")
    for place, name in places.items():
        try:
            tables[name].take(held[place])
        except ValueError as error:
            raise InputError(f"the checkpoint does not fit the model: the table {name} has {error}") from None
    return tables


def held_of(tables: Mapping[str, RowTable]) -> dict[str, Share]:
    """What this rank holds of tables, for `share_out` on another module; no copies."""
    return {folder_of(name): table.held for name, table in tables.items()}
