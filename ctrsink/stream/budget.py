"""Micro-batches under a token budget: a pure function from lengths to groups."""

import numpy as np


def fill(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Indices into `lengths`, int64 [n], in groups of `budget` tokens at most; each index once, like lengths together.

    A sequence longer than the budget is a group of its own: it cannot be divided.
    """
    order = np.argsort(-lengths, kind="stable")
    starts, used = [], budget + 1
    for place, length in enumerate(lengths[order].tolist()):
        used += length
        if used > budget:
            starts.append(place)
            used = length
    return np.split(order, starts[1:])
