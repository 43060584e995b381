"""The values that a table starts with, from a seed and the row alone: the same on any number of ranks, and on any machine."""

import math
from collections.abc import Iterator

import numpy as np

from ctrsink.features.mix64 import mix64

_BLOCK = 2**14
"""Values made at once: what is needed meanwhile stays in the processor's cache."""
_LANES = np.uint64(0x0000FFFF0000FFFF)
_MEAN = 4 * (2**16 - 1) / 2
_STD = math.sqrt(4 * (2**32 - 1) / 12)


def initial_values(rows: range, width: int, std: float, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of the values of `rows`: the first row of each, and float32 [n, width].

    Near to normal: the sum of four uniform 16-bit numbers, which are one hash of seed, row and column. So all is exact, where a
    logarithm or a cosine would differ between machines. Our decision.
    """
    at_once = max(1, _BLOCK // width)
    for first in range(rows.start, rows.stop, at_once):
        last = min(first + at_once, rows.stop)
        bits = mix64(np.arange(first * width, last * width, dtype=np.uint64), seed)
        pairs = (bits & _LANES) + ((bits >> np.uint64(16)) & _LANES)
        sums = (pairs & np.uint64(2**32 - 1)) + (pairs >> np.uint64(32))
        values = (sums.astype(np.float32) - np.float32(_MEAN)) * np.float32(std / _STD)
        yield first, values.reshape(-1, width)
