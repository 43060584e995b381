"""Signals that are categories: a small whole number for every event."""

from collections.abc import Iterable

import numpy as np

from ctrsink.features.histories import Histories
from ctrsink.features.registry import signal

DAY = 86400


def categories(
    names: Iterable[str], timestamps: np.ndarray, feedbacks: np.ndarray, utc_offset_hours: float
) -> dict[str, np.ndarray]:
    """Those of `names` that are categories, int64 [N] each.

    Args:
        timestamps: int64 [N], seconds since 1970.
        feedbacks: integers [N]; number of the text of each event's feedback in the data set.
    """
    local = timestamps + round(utc_offset_hours * 3600)
    compute = {
        "feedback": lambda: feedbacks.astype(np.int64),
        "hour": lambda: local % DAY // 3600,
        "weekday": lambda: (local // DAY + 3) % 7,  # 0 is a Monday: 1970 began on a Thursday
    }
    return {name: compute[name]() for name in names if name in compute}


def hashes(names: Iterable[str], histories: Histories) -> dict[str, np.ndarray]:
    """Those of `names` that are hashed categories, int64 [N] each, -1 where unknown; see features.columns.in_table."""
    compute = {"item_id": lambda: histories.items, "user_id": lambda: histories.users}
    found = {name: compute[name]() if name in compute else histories.columns[name] for name in names if signal(name).hashed}
    assert all(values is not None for values in found.values())
    return found  # pyright: ignore[reportReturnType]
