"""Similarity bias: a target finds the sinks of like items without having to guess from their texts."""

import torch
from torch import nn

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
