"""How much the means of chunks weigh beside single sinks, where that is learned."""

import torch
from torch import nn


class SummaryBias(nn.Module):
    """Per head an addition to the attention logits of the means, see attention.chunked; it starts at 0."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads))

    def forward(self) -> torch.Tensor:
        """[H]; a tensor of its own, which outlives gathered weights."""
        return self.weight.to(torch.float32, copy=True)
