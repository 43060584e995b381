"""Item-item similarity from what users thought of both, without the part of the user that it is asked for.

A table that keeps a user's own part tells, in training, what that user is going to answer: so it holds sums, from which the own
part is taken out exactly. For the same reason its partners are those with the most common users, never the most similar ones.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ctrsink.features.similarity import cosines

_LINE = 2_000_000  # pairs that the line through similarity over cosine is of, at most
_DENSE = 4096  # items: 64 MiB, in which a pair is found ten times faster


@dataclass(frozen=True)
class ByText:
    """Similarity of pairs that the table cannot know: what pairs in it with such a cosine of their texts have on average."""

    intercept: float
    slope: float

    def of(self, cosines: np.ndarray) -> np.ndarray:
        """float64 [N]."""
        return self.intercept + self.slope * cosines.astype(np.float64)


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
    by_text: ByText | None = None
    """Of items without a partner; None: nothing is known of these."""

    def alone(self, items: np.ndarray) -> np.ndarray:
        """Which of N items have no partner, bool [N]; those that are not in the table have none."""
        inside = (items >= 0) & (items < len(self.offsets) - 1)
        at = np.where(inside, items, 0)
        return ~inside if len(self.offsets) == 1 else ~inside | (self.offsets[at + 1] == self.offsets[at])

    def text_line(self, vectors: np.ndarray) -> ByText:
        """The line through similarity over cosine of the pairs in the table, by least squares.

        Args:
            vectors: float16 [items, width], of length 1 or 0.
        """
        every = -(-len(self.partners) // _LINE) or 1
        chosen = np.arange(0, len(self.partners), every)
        items = np.searchsorted(self.offsets, chosen, side="right") - 1
        cosine = cosines(vectors, items, self.partners[chosen])
        known = ~np.isnan(cosine)
        nobody = np.zeros(len(chosen))
        similarity = self.similarity(chosen, nobody, nobody.astype(np.bool_))[known]
        x, count = cosine[known].astype(np.float64), int(known.sum())
        if not count:
            return ByText(0.0, 0.0)
        spread = float(np.square(x - x.mean()).sum())
        slope = float(((x - x.mean()) * similarity).sum() / spread) if spread else 0.0
        return ByText(float(similarity.mean() - slope * x.mean()), slope)

    def find(self, items: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of N pairs are in the table, ascending int64 [F], and their places in it.

        Args:
            items, others: rows of the item table [N]; -1, or one that the table does not reach: unknown.
        """
        known = (items >= 0) & (others >= 0) & (items < len(self.offsets) - 1) & (others < len(self.offsets) - 1)
        rows = np.arange(len(items)) if known.all() else np.flatnonzero(known)
        if not len(rows):
            return rows, rows
        places = np.asarray(self._places[items[rows], others[rows]])
        found = np.flatnonzero(places)
        return rows[found], places[found] - 1

    def similarity(self, places: np.ndarray, own: np.ndarray, both: np.ndarray) -> np.ndarray:
        """Similarity of pairs in the table, float64 [F].

        Args:
            places: of the pairs, see `find`.
            own: [F]; product of the user's own two deviations, to be taken out of the sum; 0 where it is not in it.
            both: bool [F]; whether the user is among those counted, to be taken out of their number.
        """
        users = self.common[places] - both
        value = (self.products[places] - own) / (self.variance * (users + self.shrink))
        # Where nobody else is left the rounding of what was taken out would be all there is.
        return np.where(users > 0, value, 0.0)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without the matrix, which it makes itself."""
        return {name: value for name, value in vars(self).items() if name != "_places"}

    @cached_property
    def _places(self) -> Any:
        """A matrix whose entry (i, j) is one more than the place of the pair, or 0; sparse where a dense one would be large."""
        from scipy.sparse import csr_array

        numbers = np.arange(1, len(self.partners) + 1, dtype=np.int32)
        sparse = csr_array((numbers, self.partners, self.offsets), shape=(len(self.offsets) - 1,) * 2)
        return sparse.toarray() if len(self.offsets) - 1 <= _DENSE else sparse
