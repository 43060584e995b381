"""Ways to ask a run to save and stop: a signal to the process that was started, or `ctrsink stop`, a file in the run's folder."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

from ctrsink.run.folder import stop_request
from ctrsink.run.periodic import Every

POLL_S = 5.0


class StopRequests:
    """Looks for a request in the run's folder from time to time."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._reason: str | None = None
        self._looking = Every(POLL_S, self._look, "stop-requests")

    def reason(self) -> str | None:
        """Why the run is to stop, None as long as nobody asked."""
        return self._reason

    def close(self) -> None:
        self._looking.close()

    def _look(self) -> None:
        self._reason = self._reason or stop_request(self._run_dir)


@contextmanager
def on_sigterm(act: Callable[[str], None]) -> Generator[None, None, None]:
    """Call `act` with the reason at the first SIGTERM; a second one ends the process. Nothing changes outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        act("SIGTERM")

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
