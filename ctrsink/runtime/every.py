"""Something done again and again beside the training, in a thread of its own."""

import logging
import threading
from collections.abc import Callable

from ctrsink.errors import InputError, RunError

log = logging.getLogger("ctrsink.train")


class Every:
    """Calls `act` at once and then every `seconds`, until it is closed; what the storage refuses is tried again the next time.

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
        while not self._closed.is_set():
            try:
                self._act()
            except (InputError, RunError, OSError) as error:
                log.debug("%s: %s", self._name, error)
            self._closed.wait(self._seconds)
