"""Sink embeddings: the vector at a sink position is computed from its signals and lies in no vocabulary."""

import torch
from torch import nn


class SinkEmbedding(nn.Module):
    """Sum over signals of `Linear(Embedding(bucket))` (CTR-Sink, arXiv 2508.03668; published: `Embedding(100, 256)`).

    The linear map is shared by the signals, so that one signal is exactly the published form.
    """

    def __init__(self, signals: int, buckets: int, embedding_size: int, hidden_size: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(buckets, embedding_size) for _ in range(signals))
        self.projection = nn.Linear(embedding_size, hidden_size)

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        """Buckets int64 [B, K, S] -> vectors [B, K, D]."""
        summed = torch.stack([table(signals[..., s]) for s, table in enumerate(self.tables)]).sum(0)
        return self.projection(summed)
