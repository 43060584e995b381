"""Something done again and again beside the training, in a thread of its own."""

import logging
import threading
from collections.abc import Callable

from ctrsink.errors import first_line

log = logging.getLogger("ctrsink.train")


class Every:
    """Calls `act` at once and then every `seconds`, until it is closed; what fails is warned about once and tried again.

    Args:
        seconds: between two calls.
        act: what to do.
        name: of the thread, for messages.
    """

    def __init__(self, seconds: float, act: Callable[[], None], name: str) -> None:
        self._seconds, self._act, self._name = seconds, act, name
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> bool:
        """No call begins any more; returns whether none is under way, after one period at most."""
        self._closed.set()
        self._thread.join(self._seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        failing = False
        while not self._closed.is_set():
            try:
                self._act()
                failing = False
            except Exception as error:  # whatever it is, the next call may succeed, and nobody else would make it
                if not failing:
                    log.warning("%s: %s: %s; it is tried again", self._name, type(error).__name__, first_line(error))
                failing = True
            self._closed.wait(self._seconds)
