"""A line now and then: how much is done, how fast, how long it will take."""

import logging
import time
from collections.abc import Iterable
from typing import NamedTuple

log = logging.getLogger("ctrsink.data")
EVERY_S = 5.0


class Done(NamedTuple):
    """A piece of work."""

    work: float
    rows: int
    before: bool
    """By an earlier preparation: it says nothing of how fast this one is."""


def report(done: Iterable[Done], total: float, what: str, unit: str = "rows") -> None:
    """Go through `done` and log the progress towards `total` work."""
    started = last = time.monotonic()
    work = rows = fresh_work = fresh_rows = 0.0
    for piece in done:
        work, rows = work + piece.work, rows + piece.rows
        if not piece.before:
            fresh_work, fresh_rows = fresh_work + piece.work, fresh_rows + piece.rows
        now = time.monotonic()
        if now - last >= EVERY_S and fresh_work:
            last = now
            left = (now - started) * (total - work) / fresh_work
            log.info("%s", progress_line(what, rows, work / total, fresh_rows / (now - started), left, unit))
    log.info("%s %d %s in %.1f s", what, rows, unit, time.monotonic() - started)


def progress_line(what: str, rows: float, share: float, pace: float, left: float, unit: str = "rows") -> str:
    """Such as `read 12,000,000 rows (24 %), 310,000/s, 2 min 3 s left`."""
    seconds = round(left)
    wait = f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"
    return f"{what} {rows:,.0f} {unit} ({share:.0%}), {pace:,.0f}/s, {wait} left".replace("%", " %")
