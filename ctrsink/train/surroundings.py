"""What the place where a training process runs has to tell it; the loop knows neither Ray nor signals."""

from collections.abc import Callable
from dataclasses import dataclass


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Surroundings:
    """Questions that the loop asks between two steps."""

    stop: Callable[[], str | None] = _nothing
    """Why this rank wants the run saved and stopped, or None; asked at every step, so it must answer at once."""
    preemption: Callable[[], str | None] = _nothing
    """Which loss of a node is announced, or None: the run is saved and goes on. All ranks ask together, every few seconds."""


ALONE = Surroundings()
"""Nobody has anything to tell."""
