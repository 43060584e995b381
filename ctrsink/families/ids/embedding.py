"""A behaviour or a target becomes a vector: the sum of what its signals say, from tables that both sides share."""

import math

import torch
from torch import nn

from ctrsink.config.model.ids import IdsSpec
from ctrsink.features.registry import of_kind, signal
from ctrsink.tables.embedding import ShardedEmbedding


class SignalTables(nn.Module):
    """A table of embeddings for each category of behaviours and targets; a category of both sides has one.

    A value of an id or of a hashed column that training never met has a row that is as it was at the start: outside of training
    it is taken for the unknown, row 0, where that was trained. Ids are hidden at random in training, so that theirs is.

    Those of ids may be sharded: parts without parameters, of whose rows each worker has its share.

    Args:
        spec: which signals each side has.
    """

    def __init__(self, spec: IdsSpec) -> None:
        super().__init__()
        self.width, self.id_dropout = spec.embedding_size, spec.id_dropout
        self.rows = rows = {name: _rows(name, spec) for name in spec.categories}
        std = spec.embedding_std or 1 / math.sqrt(spec.embedding_size)

        def table(rows: int, sharded: bool) -> nn.Module:
            return ShardedEmbedding(rows, self.width, std=std) if sharded else nn.Embedding(rows, self.width)

        sharded = spec.id_tables == "sharded"
        self.ids = nn.ModuleDict({module_key(n): table(of, sharded) for n, of in rows.items() if signal(n).identity})
        self.tables = nn.ModuleDict({module_key(n): table(of, False) for n, of in rows.items() if not signal(n).identity})
        self.initial = nn.Module()
        """Tables of ids and hashed columns as they were at the start; none of sharded ones, and of a model that was settled.
        Buffers by `module_key`, that go where the model goes and are in no checkpoint."""
        for name in rows:
            part = self.table(name)
            if isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=std)
                if signal(name).hashed:
                    self.initial.register_buffer(module_key(name), part.weight.detach().clone(), persistent=False)

    def of(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Values of one category, int64 [n] -> [n, E] from its table; in training some ids are hidden."""
        if signal(name).identity and self.training and self.id_dropout:
            values = values * (torch.rand(values.shape, device=values.device) >= self.id_dropout)
        table, initial = self.table(name), getattr(self.initial, module_key(name), None)
        if isinstance(table, ShardedEmbedding):
            return table(values - 1)  # there -1 is unknown, not 0
        if self.training or initial is None:
            return table(values)
        unknown, own = table(torch.stack([torch.zeros_like(values), values]))
        never_met = (own == initial[values]).all(-1) & (unknown != initial[0]).any(-1)
        return torch.where(never_met[:, None], unknown, own)

    def settle(self) -> None:
        """Give rows that training never met the vector of the unknown, once for all: for a model that leaves its run."""
        for name in self.rows:
            if (initial := getattr(self.initial, module_key(name), None)) is None:
                continue
            weight = self.table(name).weight
            assert isinstance(weight, torch.Tensor)
            if (weight[0] != initial[0]).any():
                weight.data = torch.where((weight == initial).all(-1, keepdim=True), weight[0], weight).detach()
        self.initial = nn.Module()

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
        width: D, of the vectors.
    """

    def __init__(self, spec: IdsSpec, width: int) -> None:
        super().__init__(spec)
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


def _rows(name: str, spec: IdsSpec) -> int:
    found = signal(name)
    if found.hashed:
        return spec.rows
    return found.values or spec.buckets


def module_key(name: str) -> str:
    """A name that a module may have."""
    return name.replace("_", "__").replace(".", "_d")
