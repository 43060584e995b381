"""A line now and then: how much is done, how fast, how long it will take."""

import logging
import time

from ctrsink import terminal

EVERY_S, EVERY_S_IN_PLACE = 5.0, 0.5


class Progress:
    """Of work towards a `total`, told to `log`; what an earlier call did says nothing of how fast this one is.

    Args:
        what: such as `read`.
        unit: of what is counted beside the work.
    """

    def __init__(self, log: logging.Logger, what: str, total: float, unit: str = "rows") -> None:
        self._log, self._what, self._total, self._unit = log, what, total, unit
        self._started = self._last = time.monotonic()
        self._work = self._fresh_work = 0.0
        self._count = self._fresh_count = 0
        self._every = EVERY_S_IN_PLACE if terminal.err().isatty() else EVERY_S

    def add(self, work: float, count: int, before: bool = False) -> None:
        """Some more is done; `before`: it was by an earlier call."""
        self._work, self._count = self._work + work, self._count + count
        if not before:
            self._fresh_work, self._fresh_count = self._fresh_work + work, self._fresh_count + count
        now = time.monotonic()
        if now - self._last >= self._every and self._fresh_work and self._work < self._total:
            self._last, seconds = now, now - self._started
            share, left = self._work / self._total, seconds * (self._total - self._work) / self._fresh_work
            line = progress_line(self._what, self._count, share, self._fresh_count / seconds, left, self._unit)
            self._log.info("%s", line, extra={"progress": (self._what, share)})

    def end(self) -> None:
        """All is done."""
        seconds, whole = time.monotonic() - self._started, {"progress": (self._what, 1.0)}
        self._log.info("%s %d %s in %.1f s", self._what, self._count, self._unit, seconds, extra=whole)


def progress_line(what: str, count: float, share: float, pace: float, left: float, unit: str) -> str:
    """Such as `read 12,000,000 rows (24 %), 310,000/s, 2 min 3 s left`."""
    seconds = round(left)
    wait = f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"
    return f"{what} {count:,.0f} {unit} ({share:.0%}), {pace:,.0f}/s, {wait} left".replace("%", " %")
