"""What a family's module looks ids up with."""

import math

import torch
from torch import nn

from ctrsink.tables.hashing import rows_of
from ctrsink.tables.table import RowTable


class ShardedEmbedding(nn.Module):
    """`sum over hashes of table[hash(id)]`; without parameters: the engine steps its `table`, see RowTable.

    The values at the start depend on the state of torch's generator, as those of any module do; it must be the same on all ranks.

    Args:
        rows: of the table, whatever the number of ids; row 0 is for what is unknown.
        width: D.
        hashes: rows that an id is the sum of, 1 or 2; see rows_of.
        std: standard deviation of the vectors at the start.
    """

    def __init__(self, rows: int, width: int, hashes: int = 1, std: float = 1.0) -> None:
        super().__init__()
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.hashes, self.table = hashes, RowTable(rows, width, std / math.sqrt(hashes), seed)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [...], negative where unknown -> fp32 [..., D]. Collective: every rank must call it equally often."""
        found = self.table.lookup(rows_of(ids, self.table.rows, self.hashes))
        return found.squeeze(-2) if self.hashes == 1 else found.sum(-2)

    def extra_repr(self) -> str:
        return f"{self.table.rows}, {self.table.width}, hashes={self.hashes}"


def tables_of(module: nn.Module) -> dict[str, RowTable]:
    """The tables that a module looks up in, by the names of its parts that do."""
    return {name: part.table for name, part in module.named_modules() if isinstance(part, ShardedEmbedding)}
