"""A behaviour or a target becomes a vector: the sum of what its signals say, from tables that both sides share."""

import math

import torch
from torch import nn

from ctrsink.config.model.ids import IdsSpec
from ctrsink.families.facts import Facts
from ctrsink.features.registry import of_kind, signal
from ctrsink.tables.embedding import ShardedEmbedding


class SignalTables(nn.Module):
    """A table of embeddings for each category of behaviours and targets; a category of both sides has one.

    Those of ids may be sharded: parts without parameters, of whose rows each worker has its share.

    Args:
        spec: which signals each side has.
        facts: how many values feedback has.
    """

    def __init__(self, spec: IdsSpec, facts: Facts) -> None:
        super().__init__()
        self.width, self.id_dropout = spec.embedding_size, spec.id_dropout
        self.rows = rows = {name: _rows(name, spec, facts) for name in spec.categories}
        std = 1 / math.sqrt(spec.embedding_size)

        def table(rows: int, sharded: bool) -> nn.Module:
            return ShardedEmbedding(rows, self.width, std=std) if sharded else nn.Embedding(rows, self.width)

        sharded = spec.id_tables == "sharded"
        self.ids = nn.ModuleDict({module_key(n): table(of, sharded) for n, of in rows.items() if signal(n).identity})
        self.tables = nn.ModuleDict({module_key(n): table(of, False) for n, of in rows.items() if not signal(n).identity})
        for part in (*self.ids.values(), *self.tables.values()):
            if isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=std)

    def of(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Values of one category, int64 [n] -> [n, E] from its table; in training some ids are hidden."""
        if signal(name).identity and self.training and self.id_dropout:
            values = values * (torch.rand(values.shape, device=values.device) >= self.id_dropout)
        table = self.table(name)
        return table(values - 1) if isinstance(table, ShardedEmbedding) else table(values)  # there -1 is unknown, not 0

    def table(self, name: str) -> nn.Module:
        """The table of a category: int64 [...] -> [..., E]."""
        return (self.ids if signal(name).identity else self.tables)[module_key(name)]

    def unshard(self) -> None:
        """Put tables that look up by themselves in place of sharded ones, with the same vectors. In one process."""
        for key, part in self.ids.items():
            if isinstance(part, ShardedEmbedding):
                self.ids[key] = nn.Embedding.from_pretrained(part.vectors(range(-1, part.table.rows - 1)), freeze=False)

    def _sum(self, names: tuple[str, ...], signals: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(signals), self.width, device=signals.device)
        for place, name in enumerate(names):
            out = out + self.of(name, signals[:, place])
        return out


class EventEmbedding(SignalTables):
    """`W sum over categories of Embedding(value) + V numbers`, with W and V of each side's own, and tables that both share.

    Args:
        spec: which signals each side has.
        facts: how many values feedback has.
        width: D, of the vectors.
    """

    def __init__(self, spec: IdsSpec, facts: Facts, width: int) -> None:
        super().__init__(spec, facts)
        self.behaviour_names, self.target_names = (of_kind(side, numbers=False) for side in (spec.behaviours, spec.target))
        counts = [len(of_kind(side, numbers=True)) for side in (spec.behaviours, spec.target)]
        self.behaviour, self.target = (nn.Linear(spec.embedding_size + count, width) for count in counts)
        self.target_count = counts[1]
        """Numbers of a target."""

    def behaviours(self, signals: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """int64 [K, S] and float32 [K, F] -> [K, D]."""
        return self.behaviour(torch.cat([self._sum(self.behaviour_names, signals), numbers], -1))

    def targets(self, signals: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """int64 [T, C] and float32 [T, G] -> [T, D]."""
        return self.target(torch.cat([self._sum(self.target_names, signals), numbers], -1))


def _rows(name: str, spec: IdsSpec, facts: Facts) -> int:
    found = signal(name)
    if found.hashed:
        return spec.rows
    return spec.buckets if found.kind == "bucket" else found.values or facts.feedbacks


def module_key(name: str) -> str:
    """A name that a module may have."""
    return name.replace("_", "__").replace(".", "_d")
