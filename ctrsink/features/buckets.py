"""What a sink tells of its behaviour: integer buckets computed from the chronology (CTR-Sink, arXiv 2508.03668)."""

import numpy as np

from ctrsink.features.mix64 import mix64
from ctrsink.features.similarity import similarity_bucket


def log_bucket(seconds: np.ndarray, buckets: int) -> np.ndarray:
    """Seconds -> bucket in `1 .. buckets - 1` on a logarithmic scale that ends at 100 years; 0 is left for `unknown`."""
    scale = (buckets - 1) / np.log1p(100 * 365.25 * 86400)
    return 1 + np.minimum(buckets - 2, np.floor(scale * np.log1p(np.maximum(seconds, 0)))).astype(np.int64)


def signal_ids(
    signals: tuple[str, ...],
    timestamps: np.ndarray,
    buckets: int,
    lengths: np.ndarray | None = None,
    cosines: np.ndarray | None = None,
) -> np.ndarray:
    """Buckets of chronologies whose last event is the target.

    Args:
        signals: names, S of them.
        timestamps: int64 [N], seconds, oldest first within each chronology.
        buckets: rows of each signal's table.
        lengths: events of each chronology, none of them 0; left out, there is one.
        cosines: [N], of each event with its target, NaN where unknown; for `similarity` only.

    Returns:
        int64 [N, S]. The target's own row is there too: a sequence of several targets, each becoming a behaviour, uses it.
    """
    lengths = np.array([len(timestamps)]) if lengths is None else lengths
    return np.stack([_bucket(signal, timestamps, buckets, lengths, cosines) for signal in signals], axis=1)


def _bucket(signal: str, timestamps: np.ndarray, buckets: int, lengths: np.ndarray, cosines: np.ndarray | None) -> np.ndarray:
    ends = np.cumsum(lengths)
    match signal:
        case "recency_rank":
            return np.clip(np.repeat(ends, lengths) - np.arange(len(timestamps)) - 2, 0, buckets - 1)
        case "time_gap":
            return log_bucket(np.repeat(timestamps[ends - 1], lengths) - timestamps, buckets)
        case "previous_gap":
            gaps = log_bucket(np.diff(timestamps, prepend=timestamps[:1]), buckets)
            gaps[ends - lengths] = 0
            return gaps
        case "similarity":
            assert cosines is not None
            return similarity_bucket(cosines, buckets)
        case "random":
            return (mix64(timestamps) % np.uint64(buckets)).astype(np.int64)
        case "none":
            return np.zeros(len(timestamps), np.int64)
        case _:
            raise ValueError(f"{signal} is no signal of buckets")
