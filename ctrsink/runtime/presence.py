"""A run's folder while somebody trains there: the first rank says so from time to time, and looks for requests to stop."""

import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress

from ctrsink import storage
from ctrsink.errors import InputError, RunError
from ctrsink.train.rundir import PRESENCE_NAME, stop_request

PERIOD_S = 5.0
PATIENCE = 3
"""Periods without a word after which nobody trains there any more."""
log = logging.getLogger("ctrsink.train")


class Presence:
    """Of the first rank, in a thread of its own; storage that fails is asked again."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir, self._beats = run_dir, 0
        self._reason: str | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="presence", daemon=True)
        self._thread.start()

    def stop_reason(self) -> str | None:
        """Why somebody wants the run saved and stopped, None as long as nobody asked."""
        return self._reason

    def close(self) -> None:
        """Take the word back; storage that does not answer is not waited for."""
        self._closed.set()
        self._thread.join(PERIOD_S)

    def _watch(self) -> None:
        path = storage.join(self._run_dir, PRESENCE_NAME)
        while True:
            try:
                who = {"host": socket.gethostname(), "process": os.getpid(), "beat": self._beats}
                storage.write_bytes(path, json.dumps(who).encode())
                self._beats += 1
                self._reason = self._reason or stop_request(self._run_dir)
            except (InputError, RunError, OSError) as error:
                log.debug("the run's folder does not answer: %s", error)
            if self._closed.wait(PERIOD_S):
                break
        with suppress(InputError, RunError, OSError):
            storage.delete(path)


def require_nobody(run_dir: str) -> None:
    """Wait, where a process has left its word behind, whether it still lives: two that train one run would write over each other.

    Raises:
        InputError: it does.
    """
    found = _word(run_dir)
    if found is None:
        return
    who = f"process {found['process']} on host {found['host']}"
    log.info("%s has trained %s: waiting %g s for a sign of life", who, run_dir, PATIENCE * PERIOD_S)
    until = time.monotonic() + PATIENCE * PERIOD_S
    while time.monotonic() < until:
        time.sleep(PERIOD_S / 5)
        if (now := _word(run_dir)) is None:
            return
        if now != found:
            raise InputError(
                f"{run_dir} is being trained by {who}: end that with `ctrsink stop --run {run_dir}` before you resume it"
            )


def _word(run_dir: str) -> dict[str, object] | None:
    try:
        found = json.loads(storage.read_bytes(storage.join(run_dir, PRESENCE_NAME)))
        return found if isinstance(found, dict) and {"host", "process"} <= found.keys() else None
    except (FileNotFoundError, ValueError):
        return None
