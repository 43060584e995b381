"""Cross-entropy over the rows of a table of embeddings, be they all or a sample (Jean et al., arXiv 1412.2007, section 3)."""

import math
from collections.abc import Callable

import torch

BLOCK = 2**16
"""Rows whose scores are held at a time."""
Score = Callable[[torch.Tensor], torch.Tensor]
"""int64 [S] -> the scores of these rows for each of M positions, [M, S]."""


def log_total(score: Score, rows: int, positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`log sum exp` of the scores of all rows, [M], and the row with the highest, int64 [M]; the first of equal ones."""
    total = best = None
    place = torch.zeros(positions, dtype=torch.int64, device=device)
    for start in range(0, rows, BLOCK):
        scores = score(torch.arange(start, min(rows, start + BLOCK), device=device))
        highest, at = scores.detach().max(1)
        found = scores.logsumexp(1)
        if total is None or best is None:
            total, best, place = found, highest, at
        else:
            total = torch.logaddexp(total, found)
            place = torch.where(highest > best, at + start, place)
            best = torch.maximum(best, highest)
    assert total is not None
    return total, place


def sampled_log_total(score: Score, own: torch.Tensor, truth: torch.Tensor, sample: torch.Tensor, rows: int) -> torch.Tensor:
    """An estimate of `log_total`, [M], whose exponential is right on average.

    The true row counts as itself, each other one of the sample for `rows / S`, one by its chance of being drawn.

    Args:
        own: [M]; scores of the true rows.
        truth: int64 [M]; these.
        sample: int64 [S]; rows that were drawn, each row with the same chance.
        rows: of the table.
    """
    others = (score(sample) + math.log(rows / len(sample))).masked_fill(truth[:, None] == sample, -math.inf)
    return torch.cat([own[:, None], others], 1).logsumexp(1)
