"""A behaviour is the sum of its fields, in two groups that can be hidden; a candidate is one of which the item alone is shown."""

from typing import NamedTuple

import torch
from torch import nn

from ctrsink.config.model.srp import SrpSpec, mask_group
from ctrsink.families.ids.embedding import SignalTables
from ctrsink.features.registry import of_kind

MASK_SCALE = 0.02
"""Deviation of a [MASK] vector, and of those of positions, at the start, as in BERT."""


class Hidden(NamedTuple):
    """Rows of behaviours that have a group of fields hidden, int64 [M] each."""

    item: torch.Tensor
    behaviour: torch.Tensor
    item_mask: torch.Tensor
    """What the former are in place of their item's fields, [M, D]."""


class Fields(NamedTuple):
    """Some signals and the columns that a side has them in; None: it lacks the signal, which is then unknown, 0."""

    categories: tuple[str, ...]
    places: tuple[int | None, ...]
    """Of the categories."""
    number_places: tuple[int | None, ...]

    @classmethod
    def of(cls, names: tuple[str, ...], side: tuple[str, ...]) -> "Fields":
        """Of the signals `names`, where a side has `side`."""
        found = []
        for numbers in (False, True):
            columns = {name: place for place, name in enumerate(of_kind(side, numbers))}
            found.append(tuple(columns.get(name) for name in of_kind(names, numbers)))
        return cls(of_kind(names, numbers=False), *found)


class FieldEmbedding(SignalTables):
    """`W_g sum over categories of Embedding(value) + V_g numbers`, summed over the groups g: fields of the item, and all others.

    A group that is hidden is its [MASK] vector in place of all its fields, numbers too: one would often give the others away.
    Numbers that set a behaviour against its item, such as the deviation, are 0 where either is hidden.
    That, the numbers and a projection to each group are our decisions; the two groups are the paper's (arXiv 2407.19658).
    """

    def __init__(self, spec: SrpSpec) -> None:
        super().__init__(spec)
        of_item = _of_group(spec.behaviours, "item")
        self.told = {"item": Fields.of(of_item, spec.behaviours)}
        self.told["behaviour"] = Fields.of(_of_group(spec.behaviours, "behaviour"), spec.behaviours)
        self.of_both = Fields.of(_of_group(spec.behaviours, "both"), spec.behaviours).number_places
        self.both = nn.Linear(len(self.of_both), spec.width, bias=False) if self.of_both else None
        self.asked = Fields.of(of_item, spec.target)
        """The same fields of the item, of a target."""
        self.asked_beside = Fields.of(tuple(name for name in spec.target if name not in of_item), spec.target)
        self.item, self.behaviour = (
            nn.Linear(spec.embedding_size + len(fields.number_places), spec.width) for fields in self.told.values()
        )
        self.mask = nn.Embedding(1, spec.width)
        """Of the group `behaviour`; the objective that hides items has theirs."""
        nn.init.normal_(self.mask.weight, std=MASK_SCALE)
        self.asked_numbers = of_kind(spec.target, numbers=True)
        self.beside_width = spec.embedding_size + len(self.asked_beside.number_places)
        """Of what a target is told beside its item."""

    def behaviours(self, signals: torch.Tensor, numbers: torch.Tensor, hidden: Hidden | None = None) -> torch.Tensor:
        """int64 [K, S] and float32 [K, F] -> [K, D]."""
        item = self.item(self._said(self.told["item"], signals, numbers))
        other = self.behaviour(self._said(self.told["behaviour"], signals, numbers))
        if hidden is not None:
            item = item.index_copy(0, hidden.item, hidden.item_mask.to(item.dtype))
            other = other.index_copy(0, hidden.behaviour, self.mask(torch.zeros_like(hidden.behaviour)).to(other.dtype))
        if self.both is None:
            return item + other
        told = _columns(numbers, self.of_both)
        if hidden is not None:
            told = told.index_fill(0, hidden.item, 0.0).index_fill(0, hidden.behaviour, 0.0)
        return item + other + self.both(told.to(self.both.weight.dtype))

    def candidates(self, signals: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of targets, int64 [T, C] and float32 [T, G], what a behaviour with their item would be whose other fields are hidden,
        [T, D], and what they are told beside it, [T, E].
        """
        item = self.item(self._said(self.asked, signals, numbers))
        mask = self.mask(torch.zeros(len(signals), dtype=torch.int64, device=signals.device))
        return item + mask, self._said(self.asked_beside, signals, numbers)

    def _said(self, fields: Fields, signals: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        summed = self._sum(fields.categories, _columns(signals, fields.places))
        return torch.cat([summed, _columns(numbers, fields.number_places)], -1)


def _of_group(names: tuple[str, ...], group: str) -> tuple[str, ...]:
    return tuple(name for name in names if mask_group(name) == group)


def _columns(values: torch.Tensor, places: tuple[int | None, ...]) -> torch.Tensor:
    if not places:
        return values[:, :0]
    unknown = values.new_zeros(len(values))
    return torch.stack([unknown if place is None else values[:, place] for place in places], 1)
