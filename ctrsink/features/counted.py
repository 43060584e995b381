"""Which events of users the table of neighbours was made of."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Counted:
    """The rule by which a preparation chose them."""

    until: int
    """Events before this time, in seconds since 1970, lie in its range."""
    user_events: int
    """Of each user the latest so many of these were counted."""

    def of(self, timestamps: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which events lie in the range, and which of them were counted, bool [N] each.

        Args:
            timestamps: of the events of users, user after user, oldest first in each.
            begins: row at which each event's user begins [N].
            sizes: events of each user.
        """
        inside = timestamps < self.until
        totals = np.bincount(np.arange(len(sizes)).repeat(sizes), inside, len(sizes)).repeat(sizes)
        return inside, inside & (np.arange(len(timestamps)) - begins >= totals - self.user_events)
