"""Intervals of 95 %: over draws of users, and over seeds."""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

Interval = tuple[float, float]
_SHARE = 0.95


def by_draws(values: np.ndarray) -> Interval | None:
    """The middle 95 % of a metric over draws of users (percentile bootstrap); None where no draw gave one."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - _SHARE) / 2, (1 + _SHARE) / 2])
    return float(low), float(high)


def by_seeds(values: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean of independent `values`; None for fewer than two."""
    if len(values) < 2:
        return None
    mean, half = np.mean(values), stdtrit(len(values) - 1, (1 + _SHARE) / 2) * deviation(values) / np.sqrt(len(values))
    return float(mean - half), float(mean + half)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of the population that `values` are a sample of; nan for fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
