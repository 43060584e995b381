"""How sure a metric is: metrics over users drawn anew, many times, with the same draws for every model (paired bootstrap).

Impressions of one user are alike, so it is users that are drawn, not impressions (B. Efron, R. Tibshirani, An Introduction to the
Bootstrap, 1993, ch. 6). Scores are sorted once; a draw only changes the weights of the users.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ctrsink.evaluate.metrics import by_user, log_losses

METRICS = ("auc", "gauc", "logloss")
_BLOCK = 1 << 16


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
        return {"auc": self._auc(weights), "gauc": self._gauc(weights), "logloss": self._logloss(weights)}

    def _auc(self, weights: np.ndarray) -> np.ndarray:
        order = np.argsort(self.probabilities)
        scores, users, positive = self.probabilities[order], self.users[order], self.labels[order] > 0
        negatives = scores[~positive]
        # Negatives below each positive, and those that are not above it: the mean of both counts ties half.
        below, up_to = (np.searchsorted(negatives, scores[positive], side) for side in ("left", "right"))
        out = np.empty(len(weights))
        for start, block in _blocks(weights, len(users)):
            passed = np.zeros((len(block), len(negatives) + 1))
            np.cumsum(block[:, users[~positive]], axis=1, dtype=np.float64, out=passed[:, 1:])
            own = block[:, users[positive]].astype(np.float64)
            pairs = own.sum(axis=1) * passed[:, -1]
            ranked = (own * (passed[:, below] + passed[:, up_to])).sum(axis=1) / 2
            out[start : start + len(block)] = _divided(ranked, pairs)
        return out

    def _gauc(self, weights: np.ndarray) -> np.ndarray:
        aucs = np.full(self.count, np.nan)
        aucs[np.unique(self.users)] = by_user(self.labels, self.probabilities, self.users)[0]
        sizes = np.where(np.isnan(aucs), 0, np.bincount(self.users, minlength=self.count))
        return _ratio(weights, np.nan_to_num(aucs) * sizes, sizes)

    def _logloss(self, weights: np.ndarray) -> np.ndarray:
        losses = log_losses(self.labels, self.probabilities)
        return _ratio(weights, np.bincount(self.users, losses, self.count), np.bincount(self.users, minlength=self.count))


def _blocks(weights: np.ndarray, columns: int) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of `weights` in blocks, with the number of the first: as many at a time as stay in a processor's cache."""
    rows = max(1, _BLOCK // max(1, columns))
    for start in range(0, len(weights), rows):
        yield start, weights[start : start + rows]


def _ratio(weights: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Weighted sum over weighted count of the users, for each row of weights."""
    present = np.flatnonzero(counts)
    both = np.stack([sums, counts], axis=1)[present]
    parts = [block[:, present].astype(np.float64) @ both for _, block in _blocks(weights, len(present))]
    above, below = np.concatenate(parts).T
    return _divided(above, below)


def _divided(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
