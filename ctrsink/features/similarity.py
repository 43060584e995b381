"""How similar behaviours are to their target, by the vectors of the items' texts; what it gives a signal and the retrieval."""

import numpy as np

_AT_ONCE = 4096  # pairs: their vectors in fp32 stay in the processor's cache


def cosines(vectors: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows of `vectors`, which are of length 1 or 0.

    Args:
        vectors: float16 [R, width].
        rows, others: integers [N].

    Returns:
        float32 [N] in [-1, 1]; NaN where one of the two is a zero vector: unknown.
    """
    used, places = np.unique(np.concatenate([rows, others]), return_inverse=True)
    table = vectors[used].astype(np.float32)
    unknown: np.ndarray = np.logical_not(table.any(axis=1))
    a, b = places[: len(rows)], places[len(rows) :]
    out = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        np.einsum("ij,ij->i", table[a[part]], table[b[part]], out=out[part])
    np.clip(out, -1, 1, out=out)
    out[unknown[a] | unknown[b]] = np.nan
    return out


def similarity_bucket(cosine: np.ndarray, buckets: int) -> np.ndarray:
    """Cosine -> bucket in `1 .. buckets - 1`, linear over [-1, 1]; 0 where it is NaN. int64 [N]."""
    known = np.nan_to_num(cosine.astype(np.float64), nan=0.0)
    found = 1 + np.minimum(buckets - 2, np.floor((known + 1) / 2 * (buckets - 1))).astype(np.int64)
    return np.where(np.isnan(cosine), 0, found)


def most_similar(similar: np.ndarray, lengths: np.ndarray, count: int) -> np.ndarray:
    """Which events of some chronologies to keep: of each the last, its target, and the `count` most similar of the others.

    Of equally similar ones the later are kept; those of unknown similarity come last.

    Args:
        similar: [N], each event to the target of its chronology; NaN where it is not known.
        lengths: events of each chronology, none of them 0.

    Returns:
        bool [N].
    """
    ends = lengths.cumsum()
    wanted = np.where(np.isnan(similar), -np.inf, similar)
    wanted[ends - 1] = np.inf
    owner = np.arange(len(lengths)).repeat(lengths)
    order = np.lexsort((-np.arange(len(wanted)), -wanted, owner))
    ranks = np.arange(len(wanted)) - (ends - lengths).repeat(lengths)
    kept = np.empty(len(wanted), np.bool_)
    kept[order] = ranks <= count
    return kept
