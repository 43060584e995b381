"""Micro-batches under a token budget: a pure function from lengths to groups."""

import numpy as np


def fill(lengths: np.ndarray, budget: int, padded: bool = False) -> list[np.ndarray]:
    """Indices into `lengths`, int64 [n], in groups of `budget` tokens at most; each index once, like lengths together.

    A sequence longer than the budget is a group of its own: it cannot be divided.

    Args:
        padded: each sequence of a group counts as long as the longest of it.
    """
    order = np.argsort(-lengths, kind="stable")
    starts, used, longest = [], budget + 1, 0
    for place, own in enumerate(lengths[order].tolist()):
        used += longest if padded else own
        if used > budget:
            starts.append(place)
            used = longest = own
    return np.split(order, starts[1:])
