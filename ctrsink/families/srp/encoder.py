"""FG-BERT: a bidirectional transformer over behaviours (arXiv 2407.19658)."""

from typing import NamedTuple

import torch
from torch import nn

from ctrsink.config.model.srp import SrpSpec
from ctrsink.families.srp.attention import Attend, FeedForward, Memory, Remember
from ctrsink.families.srp.fields import MASK_SCALE
from ctrsink.sequences.batch import Axis


class Read(NamedTuple):
    """What a layer reads of the behaviours."""

    states: torch.Tensor
    """[K, D], normed."""
    memory: Memory | None
    """Keys and values of these; None: nobody uses them."""


class Block(nn.Module):
    """`x += attention(LN x)`; `x += FFN(LN x)`."""

    def __init__(self, spec: SrpSpec) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(spec.width)
        self.remember = Remember(spec.width, spec.heads)
        self.attend = Attend(spec.width, spec.heads, spec.dropout)
        self.feed = FeedForward(spec.width, spec.inner, spec.dropout)

    def read(self, states: torch.Tensor, axis: Axis, remember: bool) -> Read:
        """What the attention reads, of states [K, D]."""
        normed = self.norm(states)
        return Read(normed, self.remember(normed, axis) if remember else None)

    def forward(self, states: torch.Tensor, read: Read, axis: Axis) -> torch.Tensor:
        """States [K, D] -> those after the layer."""
        assert read.memory is not None
        return self.feed(states + self.attend(read.states, read.memory, axis))


class Encoder(nn.Module):
    """States of behaviours, each from all of its sequence.

    Positions are counted from the latest behaviour, so that what is late has the same ones in any history; norms come first in
    each layer (both our decisions).
    """

    def __init__(self, spec: SrpSpec) -> None:
        super().__init__()
        self.shared = spec.share_keys
        self.positions = nn.Embedding(spec.max_history, spec.width)
        nn.init.normal_(self.positions.weight, std=MASK_SCALE)
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, embedded: torch.Tensor, axis: Axis, whole: bool) -> tuple[torch.Tensor, list[Read]]:
        """Of behaviours [K, D] their last states, normed, and what each layer reads.

        Args:
            whole: False: the last states are not needed. The last layer then only reads, and its input is returned instead;
                where candidates have keys of their own, it needs none either.
        """
        later = axis.offsets[axis.owner + 1] - 1 - torch.arange(axis.total, device=embedded.device)
        states = self.dropout(embedded + self.positions(later))
        reads = []
        for number, block in enumerate(self.blocks, start=1):
            goes_on = whole or number < len(self.blocks)
            reads.append(block.read(states, axis, goes_on or self.shared))  # pyright: ignore[reportCallIssue]
            if goes_on:
                states = block(states, reads[-1], axis)
        return self.norm(states) if whole else states, reads
