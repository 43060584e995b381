"""What the place where a training process runs has to tell it, and takes from it; the loop knows neither Ray nor signals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _nothing(*args: object) -> None:
    del args


@dataclass(frozen=True)
class HostHooks:
    """Questions that the loop asks between two steps, and where it shows what it did."""

    stop: Callable[[], str | None] = _nothing
    """Why this rank wants the run saved and stopped, or None; asked at every step, so it must answer at once."""
    preemption: Callable[[], str | None] = _nothing
    """Which loss of a node is announced, or None: the run is saved and goes on. All ranks ask together, every few seconds."""
    doing: Callable[[int, Callable[[], str]], None] = _nothing
    """Takes how many steps have ended and what the run does now, whenever that changes, for whoever wonders what it waits for."""
    gauges: Callable[[dict[str, Any]], None] | None = None
    """Takes each row of metrics of the first rank, for whoever watches the process from outside."""


ALONE = HostHooks()
"""Nobody has anything to tell."""
