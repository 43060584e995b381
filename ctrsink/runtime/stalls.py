"""A run that makes no step for a minute says so, and what it waits for."""

import logging
import time
from collections.abc import Callable

from ctrsink.run.periodic import Every

PATIENCE_S = 60.0
BEFORE = "the data set and the last checkpoint to be read"
log = logging.getLogger("ctrsink.train")


class Stalls:
    """Warns when no step has ended for PATIENCE_S, and again when that has doubled; until it is closed.

    Args:
        what: what the run waits for until it says something else.
    """

    def __init__(self, what: str) -> None:
        self._step, self._what = -1, lambda: what
        self._begin()
        self._looking = Every(PATIENCE_S / 12, self._look, "stalls")

    def doing(self, step: int, what: Callable[[], str]) -> None:
        """From now on the run waits for `what`, which is asked only where it has to be told; `step` steps have ended."""
        self._what = what
        if step != self._step:
            self._step = step
            self._begin()

    def close(self) -> None:
        self._looking.close()

    def _begin(self) -> None:
        self._since, self._patience = time.monotonic(), PATIENCE_S

    def _look(self) -> None:
        seconds = time.monotonic() - self._since
        if seconds >= self._patience:
            self._patience *= 2
            log.warning("no step for %.0f s: waiting for %s", seconds, self._what())
