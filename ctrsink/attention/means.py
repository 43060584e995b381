"""Means over runs of rows: what stands for a chunk of a history."""

import torch


def means(of: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Mean of the rows `starts[i] .. ends[i] - 1`: [N, H, d] -> [M, H, d]; 0 of none.

    Differences of running sums: runs overlap. In fp64, in which these lose nothing that fp32 would show.

    Args:
        starts, ends: int64 [M].
    """
    sums = torch.cat([of.new_zeros(1, *of.shape[1:], dtype=torch.float64), of.double().cumsum(0)])
    counts = (ends - starts).clamp(min=1)
    # An index costs several times as much as index_select.
    return ((sums.index_select(0, ends) - sums.index_select(0, starts)) / counts[:, None, None]).to(of.dtype)
