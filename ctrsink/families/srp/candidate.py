"""Uni cross-attention: layer by layer a candidate reads what the encoder's layer reads, one way (arXiv 2407.19658)."""

import torch
from torch import nn

from ctrsink.config.model.srp import SrpSpec
from ctrsink.families.srp.attention import Attend, FeedForward, Remember
from ctrsink.families.srp.encoder import Read
from ctrsink.sequences.batch import Axis


class CrossBlock(nn.Module):
    """`c' = c + W_O softmax((W_Q LN c) (W_K H)^T / sqrt(d)) (W_V H)`; `c = c' + FFN(LN c')`.

    H is what the encoder's layer reads, so that with its W_K and W_V the keys and values are the encoder's own: none is computed
    again. The paper's "same layer" leaves open whether H is a layer's input or its output; the input is our decision.
    """

    def __init__(self, spec: SrpSpec) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(spec.width)
        self.remember = None if spec.share_keys else Remember(spec.width, spec.heads)
        self.attend = Attend(spec.width, spec.heads, spec.dropout)
        self.feed = FeedForward(spec.width, spec.inner, spec.dropout)

    def forward(self, candidates: torch.Tensor, read: Read, behaviours: Axis, targets: Axis) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        memory = read.memory if self.remember is None else self.remember(read.states, behaviours)
        assert memory is not None
        return self.feed(candidates + self.attend(self.norm(candidates), memory, targets))


class Cross(nn.Module):
    """The path of candidates, each alone: they see the history and not one another, and the history sees none of them."""

    def __init__(self, spec: SrpSpec, beside_width: int) -> None:
        super().__init__()
        self.beside = nn.Linear(beside_width, spec.width)
        self.blocks = nn.ModuleList(CrossBlock(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width)

    def forward(
        self, items: torch.Tensor, beside: torch.Tensor, reads: list[Read], behaviours: Axis, targets: Axis
    ) -> torch.Tensor:
        """[T, D], normed.

        Args:
            items: [T, D]; candidates as behaviours of which the item alone is shown.
            beside: [T, E]; what they are told beside it: the user, the hour, numbers.
            reads: of each layer.
        """
        candidates = items + self.beside(beside)
        for block, read in zip(self.blocks, reads, strict=True):
            candidates = block(candidates, read, behaviours, targets)
        return self.norm(candidates)
