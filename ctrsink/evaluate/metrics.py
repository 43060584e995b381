"""The field's metrics, exact and as pure functions: AUC over all and by user, log loss, normalised entropy, calibration error.

All of them are nan where they have no value: nothing was measured, a prediction is not finite, or a class is missing.
"""

import math
from collections.abc import Mapping

import numpy as np


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counted half. nan with one class."""
    positives = int((labels > 0).sum())
    negatives = len(labels) - positives
    if not positives or not negatives or not np.isfinite(scores).all():
        return math.nan
    # The mean rank of each distinct score counts ties half.
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((ranks[inverse][labels > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def by_user(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUC (nan with one class), positives and negatives of every user, each [U], by ascending user; for finite scores.

    One sort of one integer per impression and no loop, so that millions of users take seconds.
    """
    if not len(labels):
        return np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64)
    distinct, rank = np.unique(scores, return_inverse=True)
    _, user = np.unique(users, return_inverse=True)
    # User, then score, then label: exact up to 2^31 impressions.
    keys = (user * len(distinct) + rank) * 2 + (labels > 0)
    keys.sort()
    positive, tied = keys & 1, keys >> 1
    ties = _starts(tied)  # impressions of one user with one score
    owner = tied[ties] // len(distinct)
    first = _starts(owner)  # of a user's ties
    pos = np.add.reduceat(positive, ties)
    neg = np.diff(ties, append=len(keys)) - pos
    below = np.cumsum(neg) - neg
    below -= np.repeat(below[first], np.diff(first, append=len(ties)))
    # Twice the pairs that are in order, ties counted half: whole numbers.
    ordered = np.add.reduceat(pos * (2 * below + neg), first)
    positives, negatives = np.add.reduceat(pos, first), np.add.reduceat(neg, first)
    pairs = positives * negatives
    return np.divide(ordered, 2 * pairs, out=np.full(len(first), np.nan), where=pairs > 0), positives, negatives


def _starts(ascending: np.ndarray) -> np.ndarray:
    """Where each distinct value begins, int64 [N] -> int64 [K]."""
    return np.flatnonzero(np.diff(ascending, prepend=ascending[0] - 1))


def gauc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    """AUC per user, averaged with the user's number of impressions; users with one class are left out.

    GAUC as in Zhu et al. 2017 (arXiv 1703.02091).
    """
    return user_metrics(labels, scores, users)["gauc"]


def user_metrics(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """The mean AUC of users in three forms, and how many users each is over; constant scores count 0.5.

    `gauc` weighs users by their impressions (GAUC, arXiv 1703.02091), `uauc` weighs them equally (UAUC, arXiv 2310.19488); both
    are over the `users` that have both classes. `uauc_two` is as `uauc`, over the `users_two` that have at least two impressions
    of each class: the AUC of one against one is 0 or 1.
    """
    if not np.isfinite(scores).all():
        return dict.fromkeys(("gauc", "uauc", "users", "uauc_two", "users_two"), math.nan)
    aucs, positives, negatives = by_user(labels, scores, users)
    fewest, impressions = np.minimum(positives, negatives), positives + negatives
    both, two = fewest >= 1, fewest >= 2
    return {
        "gauc": float(np.average(aucs[both], weights=impressions[both])) if both.any() else math.nan,
        "uauc": float(aucs[both].mean()) if both.any() else math.nan,
        "users": int(both.sum()),
        "uauc_two": float(aucs[two].mean()) if two.any() else math.nan,
        "users_two": int(two.sum()),
    }


def logloss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log likelihood, in nats."""
    if not len(labels) or not np.isfinite(probabilities).all():
        return math.nan
    return float(log_losses(labels, probabilities).mean())


def log_losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Negative log likelihood of each impression, in nats, [N]; that of a certain mistake is finite."""
    p = np.clip(probabilities.astype(np.float64), 1e-12, 1 - 1e-12)
    return -np.where(labels > 0, np.log(p), np.log1p(-p))


def normalised_entropy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Log loss over that of always predicting the share of positives; below 1 is better than that. nan with one class."""
    if not len(labels) or labels.min() == labels.max():
        return math.nan
    return logloss(labels, probabilities) / logloss(labels, np.full(len(labels), labels.mean()))


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 20) -> float:
    """Expected calibration error over `bins` of about equally many impressions; equal predictions share a bin."""
    if not len(labels) or not np.isfinite(probabilities).all():
        return math.nan
    _, inverse, counts = np.unique(probabilities, return_inverse=True, return_counts=True)
    middles = np.cumsum(counts) - counts / 2
    bin_of = (middles * bins / len(labels)).astype(np.int64)[inverse]
    # The bin's count times (mean label - mean probability).
    return float(np.abs(np.bincount(bin_of, labels - probabilities)).sum() / len(labels))


def calibration_error_of(counts: np.ndarray, gaps: np.ndarray, bins: int = 20) -> float:
    """As `calibration_error`, of ascending different predictions: impressions of each, and their sum of labels - predictions."""
    middles = np.cumsum(counts) - counts / 2
    bin_of = (middles * bins / counts.sum()).astype(np.int64)
    return float(np.abs(np.bincount(bin_of, gaps)).sum() / counts.sum())


def all_metrics(labels: np.ndarray, probabilities: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """Every metric, by name, over N impressions: labels 0/1, probabilities and user ids, each [N]."""
    return {
        "impressions": len(labels),
        "auc": auc(labels, probabilities),
        **user_metrics(labels, probabilities, users),
        "logloss": logloss(labels, probabilities),
        "normalised_entropy": normalised_entropy(labels, probabilities),
        "calibration_error": calibration_error(labels, probabilities),
    }


def no_better_than_the_mean(metrics: Mapping[str, float | None]) -> str | None:
    """What to say of a model that gained nothing over a constant, on the impressions of these metrics; None of a better one."""
    value = metrics["normalised_entropy"]
    if value is None or not round(value, 9) >= 1:  # a constant itself may come out a hair below
        return None
    return f"not better than always predicting the mean click rate (normalised entropy {value:.4f}, better is below 1)"
