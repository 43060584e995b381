"""Numbers as the model sees them: z-scores of the training range, clipped."""

from collections.abc import Mapping, Sequence

import numpy as np

from ctrsink.features.histories import Histories
from ctrsink.features.registry import signal

CLIP = 4.0
_RESOLUTION = 2e-7  # of a number that was held as float32, relative


def number(name: str, histories: Histories) -> np.ndarray:
    """The number `name` of every event, float64 [N]; NaN where it is unknown."""
    compute = signal(name).number
    assert compute is not None
    return compute(histories)


def z_scores(names: Sequence[str], histories: Histories, scales: Mapping[str, tuple[float, float]]) -> np.ndarray:
    """The numbers `names` of every event, float32 [N, len(names)]: less the mean, by the deviation, within CLIP; unknown is 0.

    So is one that was the same everywhere: what float32 and sums leave of its deviation says nothing.

    Args:
        scales: mean and deviation of each.
    """
    out = np.zeros((len(histories.begins), len(names)), np.float32)
    for place, name in enumerate(names):
        mean, deviation = scales[name]
        if deviation > _RESOLUTION * abs(mean):
            scaled = (number(name, histories) - mean) / deviation
            out[:, place] = np.clip(np.nan_to_num(scaled, nan=0.0), -CLIP, CLIP)
    return out
