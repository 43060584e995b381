"""A hash of integers that is the same everywhere."""

import numpy as np


def mix64(values: np.ndarray, *keys: int) -> np.ndarray:
    """A 64-bit hash of integers under integer keys, equal on every machine and in every version of numpy (splitmix64)."""
    out = values.astype(np.uint64)
    with np.errstate(over="ignore"):
        for key in (0, *keys):
            out = out + np.uint64(key % 2**64) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
            out = (out ^ (out >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            out = (out ^ (out >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            out = out ^ (out >> np.uint64(31))
    return out
