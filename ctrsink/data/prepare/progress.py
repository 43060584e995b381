"""A line now and then: how much is done, how fast, how long it will take."""

import logging
import time
from collections.abc import Iterable, Iterator

log = logging.getLogger("ctrsink.data")
EVERY_S = 5.0


def reported(done: Iterable[tuple[float, int]], total: float, what: str) -> Iterator[None]:
    """Pass through `done`, pairs of (amount of work, rows), and log the progress towards `total` work."""
    started = last = time.monotonic()
    work, rows = 0.0, 0
    for amount, count in done:
        work, rows = work + amount, rows + count
        now = time.monotonic()
        if now - last >= EVERY_S:
            last = now
            log.info("%s", progress_line(what, work / total, rows, now - started))
        yield None
    log.info("%s %d rows in %.1f s", what, rows, time.monotonic() - started)


def progress_line(what: str, share: float, rows: int, seconds: float) -> str:
    """Such as `read 12,000,000 rows (24 %), 310,000/s, 2 min 3 s left`."""
    left = round(seconds * (1 - share) / share) if share else 0
    wait = f"{left // 60} min {left % 60} s" if left >= 60 else f"{left} s"
    return f"{what} {rows:,} rows ({share:.0%}), {rows / max(seconds, 1e-9):,.0f}/s, {wait} left".replace("%", " %")
