"""Metrics of more rows than memory holds: sums over parts, and an AUC from counts of like predictions, with its error."""

import math

import numpy as np

from ctrsink.evaluate.metrics import by_user, calibration_error_of, log_losses
from ctrsink.evaluate.predictions import Predictions

_CUT = 10  # of a float32's 23 bits of fraction: bins are 2^-13 wide, relative to the prediction, or to its distance from 1
_HALF = int(np.float32(0.5).view(np.int32)) >> _CUT
BINS = 2 * _HALF + 1


class BinnedMetrics:
    """The metrics of `all_metrics`, from parts of which none shares a user with another; 50 MB, whatever the number of rows.

    All but two are the same but for the rounding of sums. `auc` takes the predictions of one bin for equal, and is off by
    `auc_error` at most, which is told beside it: half the share of pairs of a positive and a negative that lie in one bin.
    `calibration_error` takes them for equal too.
    """

    def __init__(self) -> None:
        self._negatives, self._positives = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
        self._sums = np.zeros(BINS)  # of predictions
        self._totals: dict[str, float] = {}

    def add(self, part: Predictions) -> None:
        """Count a part, whose users are whole."""
        bins = bins_of(part.probabilities)
        self._positives += np.bincount(bins[part.labels > 0], minlength=BINS)
        self._negatives += np.bincount(bins[part.labels <= 0], minlength=BINS)
        self._sums += np.bincount(bins, part.probabilities, BINS)
        aucs, positives, negatives = by_user(part.labels, part.probabilities, part.users)
        fewest, impressions = np.minimum(positives, negatives), positives + negatives
        both, two = fewest >= 1, fewest >= 2
        found = {
            "loss": float(log_losses(part.labels, part.probabilities).sum()),
            "weighted": float((aucs[both] * impressions[both]).sum()),
            "impressions": int(impressions[both].sum()),
            "uauc": float(aucs[both].sum()),
            "users": int(both.sum()),
            "uauc_two": float(aucs[two].sum()),
            "users_two": int(two.sum()),
        }
        self._totals = {name: self._totals.get(name, 0) + value for name, value in found.items()}

    def metrics(self) -> dict[str, float]:
        """Those of all parts so far, at least one impression."""
        total = self._totals
        positives, negatives = int(self._positives.sum()), int(self._negatives.sum())
        count, pairs = positives + negatives, float(positives) * float(negatives)
        below = np.cumsum(self._negatives) - self._negatives
        # Pairs in order and pairs of one bin: in floating point, for they may be more than an int64 holds.
        ordered = float((self._positives.astype(np.float64) * below).sum())
        tied = float((self._positives.astype(np.float64) * self._negatives).sum())
        share, loss = positives / count, total["loss"] / count
        entropy = -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)
        filled = np.flatnonzero(self._positives + self._negatives)
        sizes = (self._positives + self._negatives)[filled]
        return {
            "impressions": count,
            "auc": _divided(ordered + tied / 2, pairs),
            "auc_error": _divided(tied / 2, pairs),
            "gauc": _divided(total["weighted"], total["impressions"]),
            "uauc": _divided(total["uauc"], total["users"]),
            "users": total["users"],
            "uauc_two": _divided(total["uauc_two"], total["users_two"]),
            "users_two": total["users_two"],
            "logloss": loss,
            "normalised_entropy": _divided(loss, entropy),
            "calibration_error": calibration_error_of(sizes, (self._positives - self._sums)[filled]),
        }


def bins_of(probabilities: np.ndarray) -> np.ndarray:
    """The bin of each prediction, which rises with it, int64 [N]; as fine near 1 as near 0."""
    low = probabilities <= 0.5
    nearest = np.where(low, probabilities, 1 - probabilities).astype(np.float32)
    steps = (nearest.view(np.int32) >> _CUT).astype(np.int64)
    return np.where(low, steps, 2 * _HALF - steps)


def _divided(above: float, below: float) -> float:
    return above / below if below else math.nan
