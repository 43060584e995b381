"""What a sink tells of its behaviour: integer buckets computed from the chronology (CTR-Sink, arXiv 2508.03668)."""

import numpy as np

from ctrsink.config.data import Signal
from ctrsink.data.order import mix64


def log_bucket(seconds: np.ndarray, buckets: int) -> np.ndarray:
    """Seconds -> bucket in `1 .. buckets - 1` on a logarithmic scale that ends at 100 years; 0 is left for `unknown`."""
    scale = (buckets - 1) / np.log1p(100 * 365.25 * 86400)
    return 1 + np.minimum(buckets - 2, np.floor(scale * np.log1p(np.maximum(seconds, 0)))).astype(np.int64)


def signal_ids(signals: tuple[Signal, ...], timestamps: np.ndarray, buckets: int) -> np.ndarray:
    """Buckets of a chronology whose last event is the target.

    Args:
        signals: names, S of them.
        timestamps: int64 [N], seconds, oldest first.
        buckets: rows of each signal's table.

    Returns:
        int64 [N, S]. The target's own row is there too: a sequence of several targets, each becoming a behaviour, uses it.
    """
    return np.stack([_bucket(signal, timestamps, buckets) for signal in signals], axis=1)


def _bucket(signal: Signal, timestamps: np.ndarray, buckets: int) -> np.ndarray:
    count = len(timestamps)
    match signal:
        case "recency_rank":
            return np.clip(np.arange(count)[::-1] - 1, 0, buckets - 1)
        case "time_gap":
            return log_bucket(timestamps[-1] - timestamps, buckets)
        case "previous_gap":
            gaps = log_bucket(np.diff(timestamps, prepend=timestamps[:1]), buckets)
            gaps[:1] = 0
            return gaps
        case "random":
            return (mix64(timestamps) % np.uint64(buckets)).astype(np.int64)
        case "none":
            return np.zeros(count, np.int64)
