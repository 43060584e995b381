"""The field's metrics, exact and as pure functions: AUC, GAUC, log loss, normalised entropy, calibration error."""

import numpy as np


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counted half. nan with one class."""
    positives = int((labels > 0).sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    # The mean rank of each distinct score counts ties half.
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((ranks[inverse][labels > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def gauc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    """AUC per user, averaged with the user's number of impressions; users with one class are left out (as usual in CTR work)."""
    total = weight = 0.0
    order = np.argsort(users, kind="stable")
    bounds = np.flatnonzero(np.diff(users[order])) + 1
    for rows in np.split(order, bounds):
        value = auc(labels[rows], scores[rows])
        if not np.isnan(value):
            total += value * len(rows)
            weight += len(rows)
    return total / weight if weight else float("nan")


def logloss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log likelihood, in nats."""
    p = np.clip(probabilities.astype(np.float64), 1e-12, 1 - 1e-12)
    return float(-np.mean(np.where(labels > 0, np.log(p), np.log1p(-p))))


def normalised_entropy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Log loss over that of always predicting the share of positives; below 1 is better than that. nan with one class."""
    if labels.min() == labels.max():
        return float("nan")
    return logloss(labels, probabilities) / logloss(labels, np.full(len(labels), labels.mean()))


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 20) -> float:
    """Expected calibration error over `bins` of about equally many impressions; equal predictions share a bin."""
    _, inverse, counts = np.unique(probabilities, return_inverse=True, return_counts=True)
    middles = np.cumsum(counts) - counts / 2
    bin_of = (middles * bins / len(labels)).astype(np.int64)[inverse]
    # The bin's count times (mean label - mean probability).
    return float(np.abs(np.bincount(bin_of, labels - probabilities)).sum() / len(labels))


def all_metrics(labels: np.ndarray, probabilities: np.ndarray, users: np.ndarray) -> dict[str, float]:
    """Every metric, by name, over N impressions: labels 0/1, probabilities and user ids, each [N]."""
    return {
        "impressions": len(labels),
        "auc": auc(labels, probabilities),
        "gauc": gauc(labels, probabilities, users),
        "logloss": logloss(labels, probabilities),
        "normalised_entropy": normalised_entropy(labels, probabilities),
        "calibration_error": calibration_error(labels, probabilities),
    }
