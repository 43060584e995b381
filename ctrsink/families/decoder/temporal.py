"""Temporal bias: how far, in time, a target is from each sink, as a learned addition to its attention logits."""

import math

import torch
from torch import nn

DAY, WEEK = 86400, 7 * 86400


class TemporalBias(nn.Module):
    """Per head: a slope on the logarithm of the gap, and tables of the difference in hour of day and in weekday.

    The form of SparseCTR's relative temporal encoding (arXiv 2601.17836). A sequence of many targets cannot tell its sinks how
    far each target is; this tells the rows of the targets (DTI, arXiv 2503.01001). It starts at 0: the model without it.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(heads))
        self.hour = nn.Embedding(24, heads)
        self.weekday = nn.Embedding(7, heads)
        for table in (self.hour, self.weekday):
            nn.init.zeros_(table.weight)

    def forward(self, asked: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Seconds since 1970 of targets, int64 [B, R], and of sinks, [B, K] -> [B, H, R, K]."""
        gap = (asked[:, :, None] - seen[:, None, :]).clamp(min=0).float()
        logs = torch.log1p(gap) / math.log1p(365.25 * DAY)
        hours = _parts(asked, DAY, 24)[:, :, None] - _parts(seen, DAY, 24)[:, None, :]
        days = _parts(asked, WEEK, 7)[:, :, None] - _parts(seen, WEEK, 7)[:, None, :]
        out = logs[..., None] * self.slope + self.hour(hours % 24) + self.weekday(days % 7)
        return out.permute(0, 3, 1, 2)


def _parts(seconds: torch.Tensor, period: int, parts: int) -> torch.Tensor:
    """In which of the equal `parts` of its `period` a moment lies."""
    return (seconds % period) * parts // period
