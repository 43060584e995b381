"""Similarity bias: a target finds the sinks of like items without having to guess from their texts."""

import torch
from torch import nn

from ctrsink.attention.packed import Packed
from ctrsink.sequences.batch import Batch

STRENGTH = 10.0  # similarities are small numbers: most lie within 0.1


class SimilarityBias(nn.Module):
    """Per head a learned slope on the similarity of target and sink, added to the attention logits of the target.

    Slopes start from 0 to 2 over the heads: some heads look for like items from the first step on, others do not.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.linspace(0, 2, heads))

    def forward(self, similarity: torch.Tensor) -> torch.Tensor:
        """[B, T, K] -> [B, H, T, K]."""
        return STRENGTH * similarity[:, None] * self.slope[:, None, None]


def similarity_of(batch: Batch, packed: Packed) -> torch.Tensor:
    """Of each event asked and each sink of its sequence, [B, M, K]; 0 where there is none, or nothing is known."""
    pairs, asked, sinks = batch.axes["pairs"], packed.asked, packed.sinks
    seen = sinks.axis.offsets.diff()[pairs.owner].clamp(min=1)  # where a sequence has pairs it has sinks
    slot = (pairs.owner * asked.width + pairs.place // seen) * sinks.width + pairs.place % seen
    empty = torch.zeros(len(asked.axis.lengths) * asked.width * sinks.width, device=slot.device)
    return empty.index_copy(0, slot, batch.inputs["similarity"]).view(-1, asked.width, sinks.width)
