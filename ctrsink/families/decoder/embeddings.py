"""Signals become vectors: what a sink is, and what is added to a target. Every part starts at the scale of token embeddings."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

NUMBERS_WIDTH = 64


def token_scale(backbone: nn.Module) -> float:
    """Root mean square of the token embeddings of a backbone, as built or loaded; 0.02 where there are no values yet.

    A vector many times longer than those of tokens takes all attention at first, and a step of Adam moves it further than any
    token: sinks must start where tokens are.
    """
    weight = backbone.get_input_embeddings().weight.detach()  # pyright: ignore[reportCallIssue]
    return 0.02 if weight.is_meta else float(weight.float().square().mean().sqrt())


class Table(NamedTuple):
    """The embeddings of one category."""

    rows: int
    ids: bool
    """Of who or which, not of what: see Signal.identity."""


class CategoryEmbedding(nn.Module):
    """`Linear(sum over signals of Embedding(value))` (CTR-Sink, arXiv 2508.03668; published: one signal, `Embedding(100, 256)`).

    Args:
        tables: of the signals, in their order.
        scale: root mean square of the vectors at the start.
        id_dropout: share of the ids that is replaced by 0, unknown, in training.
    """

    def __init__(self, tables: Sequence[Table], width: int, hidden_size: int, scale: float, id_dropout: float) -> None:
        super().__init__()
        self.ids = nn.ModuleDict({str(place): nn.Embedding(of.rows, width) for place, of in enumerate(tables) if of.ids})
        """By place among the signals."""
        self.tables = nn.ModuleList(nn.Embedding(of.rows, width) for of in tables if not of.ids)
        self.projection = nn.Linear(width, hidden_size)
        self.id_dropout = id_dropout
        self.others = [place for place, of in enumerate(tables) if not of.ids]
        for table in (*self.tables, *self.ids.values()):
            nn.init.normal_(table.weight, std=scale / math.sqrt(len(tables)))  # pyright: ignore[reportArgumentType]
        nn.init.normal_(self.projection.weight, std=1 / math.sqrt(width))
        nn.init.zeros_(self.projection.bias)

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        """int64 [..., S] -> vectors [..., D]."""
        found = [table(signals[..., place]) for place, table in zip(self.others, self.tables, strict=True)]
        for place, table in self.ids.items():
            known = signals[..., int(place)]
            if self.training and self.id_dropout:
                known = known * (torch.rand_like(known, dtype=torch.float32) >= self.id_dropout)
            found.append(table(known))
        return self.projection(torch.stack(found).sum(0))


class NumberEmbedding(nn.Module):
    """`W2 gelu(W1 numbers)` of z-scores; no norm, which would take away how large they are together."""

    def __init__(self, numbers: int, hidden_size: int, scale: float) -> None:
        super().__init__()
        self.inner = nn.Linear(numbers, NUMBERS_WIDTH)
        self.outer = nn.Linear(NUMBERS_WIDTH, hidden_size)
        nn.init.normal_(self.outer.weight, std=2 * scale / math.sqrt(NUMBERS_WIDTH))
        nn.init.zeros_(self.outer.bias)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """[..., F] -> vectors [..., D]."""
        return self.outer(functional.gelu(self.inner(numbers)))


class SignalEmbedding(nn.Module):
    """The sum of what categories and numbers say.

    Args:
        categories: tables of the signals that have one.
        width: of these.
        numbers: number of z-scores.
        scale: see token_scale.
        id_dropout: see CategoryEmbedding.
    """

    def __init__(
        self, categories: Sequence[Table], width: int, numbers: int, hidden_size: int, scale: float, id_dropout: float
    ) -> None:
        super().__init__()
        self.categories = CategoryEmbedding(categories, width, hidden_size, scale, id_dropout) if categories else None
        self.numbers = NumberEmbedding(numbers, hidden_size, scale) if numbers else None

    def forward(self, categories: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """int64 [..., S] and float32 [..., F] -> vectors [..., D]."""
        parts = [] if self.categories is None else [self.categories(categories)]
        if self.numbers is not None:
            parts.append(self.numbers(numbers))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]
