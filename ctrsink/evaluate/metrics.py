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
    _, users = np.unique(users, return_inverse=True)
    values = aucs_by_user(labels, scores, users)
    known = ~np.isnan(values)
    weights = np.bincount(users, minlength=len(values))[known]
    return float(values[known] @ weights / weights.sum()) if weights.any() else float("nan")


def aucs_by_user(labels: np.ndarray, scores: np.ndarray, users: np.ndarray, count: int = 0) -> np.ndarray:
    """AUC of each user, float64 [U]; nan with one class. `users` [N] are numbers in 0 .. U - 1, U is at least `count`."""
    order = np.lexsort((scores, users))
    users, scores, positive = users[order], scores[order], labels[order] > 0
    opens = np.ones(len(users), np.bool_)
    opens[1:] = (np.diff(users) != 0) | (np.diff(scores) != 0)
    # The mean rank of equal scores of a user counts ties half.
    firsts = np.flatnonzero(opens)
    sizes = np.diff(np.append(firsts, len(users)))
    ranks = (firsts + (sizes + 1) / 2).repeat(sizes) - np.searchsorted(users, users)
    counts, positives = np.bincount(users, minlength=count), np.bincount(users, positive, count)
    pairs = positives * (counts - positives)
    above = np.bincount(users, ranks * positive, count) - positives * (positives + 1) / 2
    return np.divide(above, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)


def logloss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log likelihood, in nats."""
    return float(log_losses(labels, probabilities).mean())


def log_losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Negative log likelihood of each impression, in nats, [N]; that of a certain mistake is finite."""
    p = np.clip(probabilities.astype(np.float64), 1e-12, 1 - 1e-12)
    return -np.where(labels > 0, np.log(p), np.log1p(-p))


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
