"""Threads in the background: the end of the program waits a moment for them, not for as long as a storage may be away."""

import atexit
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar
from weakref import WeakSet

PATIENCE_S = 2.0
T = TypeVar("T")
_threads: WeakSet[threading.Thread] = WeakSet()
ending = threading.Event()
"""Set when the program ends: a thread in the background begins nothing new."""


def start(work: Callable[[], None], name: str) -> None:
    """Run `work` in a thread of the background."""
    thread = threading.Thread(target=work, daemon=True, name=name)
    _threads.add(thread)
    thread.start()


def begin(read: Callable[[], T], places: threading.Semaphore) -> Future[T]:
    """Call `read` in a thread of its own, as soon as one of the `places` is free."""
    reading: Future[T] = Future()

    def work() -> None:
        with places:
            if ending.is_set():
                return
            try:
                reading.set_result(read())
            except BaseException as error:
                reading.set_exception(error)

    start(work, "ctrsink-reading")
    return reading


@atexit.register
def _end() -> None:
    """A thread that comes back from native code while the interpreter is taken down would abort the process."""
    ending.set()
    deadline = time.monotonic() + PATIENCE_S
    for thread in list(_threads):
        thread.join(max(0.0, deadline - time.monotonic()))
