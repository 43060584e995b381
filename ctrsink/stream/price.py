"""What a sequence costs, told from the number of its events alone: no shard has to be opened to share a step out."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Price:
    """Of a model's sequences, beside what one event takes in matrix products: that is 1."""

    pairs: float = 0.0
    """What one event takes of attention for each event of the row that it stands in."""
    together: float = 1.0
    """Impressions of a request, on average, that stand in one row behind one history."""

    def of(self, events: np.ndarray) -> np.ndarray:
        """What rows of so many events cost, float64."""
        return events * (1.0 + self.pairs * events)


PLAIN = Price()
"""By numbers of events."""
