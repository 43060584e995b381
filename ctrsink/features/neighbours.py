"""Item-item similarity from what users thought of both, without the part of the user that it is asked for.

A table that keeps a user's own part tells, in training, what that user is going to answer: so it holds sums, from which the own
part is taken out exactly. For the same reason its partners are those with the most common users, never the most similar ones.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Neighbours:
    """Partners of I items: of item i those in `[offsets[i], offsets[i + 1])`, ascending.

    `similarity(i, j) = product / (variance * (common + shrink))`: a covariance over common users, drawn to 0 where they are few.
    """

    offsets: np.ndarray
    """int64 [I + 1]."""
    partners: np.ndarray
    """int32 [P]; rows of the item table."""
    products: np.ndarray
    """float32 [P]; sum over users who have both items of the product of their two deviations beyond the user's own."""
    common: np.ndarray
    """int32 [P]; number of these users."""
    variance: float
    """Mean square of such a deviation."""
    shrink: float

    def similarity(self, items: np.ndarray, others: np.ndarray, own: np.ndarray, both: np.ndarray) -> np.ndarray:
        """Similarity of pairs, float32 [N]; 0 where `others` is no partner of `items`.

        Args:
            items, others: rows of the item table [N]; -1: unknown.
            own: [N]; product of the user's own two deviations, to be taken out of the sum; 0 where it is not in it.
            both: bool [N]; whether the user is among those counted, to be taken out of their number.
        """
        out = np.zeros(len(items), np.float32)
        places = self._find(items, others)
        found = np.flatnonzero(places)
        at = places[found] - 1
        users = self.common[at] - both[found]
        value = (self.products[at] - own[found]) / (self.variance * (users + self.shrink))
        # Where nobody else is left the rounding of what was taken out would be all there is.
        out[found] = np.where(users > 0, value, 0.0)
        return out

    @cached_property
    def _places(self) -> Any:
        """A sparse matrix whose entry (i, j) is one more than the place of the pair."""
        from scipy.sparse import csr_array

        numbers = np.arange(1, len(self.partners) + 1, dtype=np.int32)
        return csr_array((numbers, self.partners, self.offsets), shape=(len(self.offsets) - 1,) * 2)

    def _find(self, items: np.ndarray, others: np.ndarray) -> np.ndarray:
        known = (items >= 0) & (others >= 0) & (items < len(self.offsets) - 1) & (others < len(self.offsets) - 1)
        out = np.zeros(len(items), np.int32)
        if known.all() and len(items):
            out[:] = self._places[items, others]
        elif known.any():
            out[known] = self._places[items[known], others[known]]
        return out
