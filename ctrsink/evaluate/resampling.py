"""How sure a metric is: metrics over users drawn anew, many times, with the same draws for every model (paired bootstrap).

Impressions of one user are alike, so it is users that are drawn, not impressions (B. Efron, R. Tibshirani, An Introduction to the
Bootstrap, 1993, ch. 6). Scores are sorted once; a draw only changes the weights of the users.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ctrsink.evaluate.metrics import by_user, log_losses

METRICS = ("auc", "gauc", "logloss")


def draws(users: int, times: int, seed: int = 0) -> np.ndarray:
    """How often each of `users` is drawn, in `times` draws of as many users with replacement, uint8 [times, users]."""
    chance = np.random.default_rng(seed)
    out = np.empty((times, users), np.uint8)  # nobody is drawn 256 times: the counts are Poisson with mean 1
    for row in out:
        row[:] = np.minimum(np.bincount(chance.integers(0, users, users), minlength=users), 255)
    return out


@dataclass(frozen=True)
class Resampled:
    """Metrics of one model, by the weights of U users.

    Args:
        labels: 0 or 1, [N].
        probabilities: float [N].
        users: int [N], each in 0 .. U - 1.
        count: U.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    users: np.ndarray
    count: int

    def over(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """METRICS as float64 [times]; `weights` [times, U] are whole numbers. nan where one class has no weight."""
        return {
            "auc": np.fromiter(self._aucs(weights), np.float64, len(weights)),
            "gauc": self._gauc(weights),
            "logloss": self._logloss(weights),
        }

    def _aucs(self, weights: np.ndarray) -> Iterator[float]:
        order = np.argsort(self.probabilities)
        scores, users, positive = self.probabilities[order], self.users[order], self.labels[order] > 0
        negatives = scores[~positive]
        # Negatives below each positive, and those that are not above it: the mean of both counts ties half.
        below, up_to = (np.searchsorted(negatives, scores[positive], side) for side in ("left", "right"))
        of_positives, of_negatives = users[positive], users[~positive]
        passed = np.zeros(len(negatives) + 1)
        for row in weights:
            weight = row.astype(np.float64)
            np.cumsum(weight[of_negatives], out=passed[1:])
            own = weight[of_positives]
            pairs = own.sum() * passed[-1]
            yield float(own @ (passed[below] + passed[up_to]) / (2 * pairs)) if pairs else float("nan")

    def _gauc(self, weights: np.ndarray) -> np.ndarray:
        aucs = np.full(self.count, np.nan)
        aucs[np.unique(self.users)] = by_user(self.labels, self.probabilities, self.users)[0]
        sizes = np.where(np.isnan(aucs), 0, np.bincount(self.users, minlength=self.count))
        return _ratio(weights, np.nan_to_num(aucs) * sizes, sizes)

    def _logloss(self, weights: np.ndarray) -> np.ndarray:
        losses = log_losses(self.labels, self.probabilities)
        return _ratio(weights, np.bincount(self.users, losses, self.count), np.bincount(self.users, minlength=self.count))


def _ratio(weights: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Weighted sum over weighted count, row by row: the product at once would copy all weights."""
    both = np.stack([sums, counts], axis=1)
    above, below = np.array([row.astype(np.float64) @ both for row in weights]).reshape(-1, 2).T
    return np.divide(above, below, out=np.full(len(weights), np.nan), where=below > 0)
