"""A run's folder is held by the process that started it, so that no two train one run: they would write over each other."""

import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

from ctrsink import storage
from ctrsink.errors import InputError, RunError
from ctrsink.run.folder import PRESENCE_NAME, read_run, request_stop, withdraw_stop
from ctrsink.run.periodic import Every

PERIOD_S = 5.0
PATIENCE = 4
"""Periods without a sign of life after which the holder counts as dead: a retry of the storage may take two of them."""
SETTLE_S = 1.0
log = logging.getLogger("ctrsink.train")


@contextmanager
def held(run_dir: str) -> Generator[Callable[[], bool], None, None]:
    """Hold the run's folder meanwhile, by a file with a sign of life in it, a new one every PERIOD_S.

    What it gives ends the signs of life, which would make a folder anew that is removed, and says whether the folder is still
    held by this process.

    No clock of another host is compared: a holder is alive if its file changes while one looks. The process that starts a run
    holds it, not its workers, which may be started again while it lives. One that was taken for dead and was not (it was
    suspended, or cut off) finds the file another's, and interrupts itself as Ctrl-C would.

    Raises:
        InputError: another process holds it, and lives.
    """
    path = storage.join(run_dir, PRESENCE_NAME)
    sign = {"host": socket.gethostname(), "process": os.getpid(), "token": secrets.token_hex(8), "beat": 0}
    made = not storage.exists(run_dir)
    _take(run_dir, path, sign)
    lost = False

    def ours() -> bool:
        return (_sign_of_life(path) or {}).get("token") == sign["token"]

    def beat() -> None:
        nonlocal lost
        found = _sign_of_life(path)
        if found is not None and found.get("token") != sign["token"]:
            if not lost:
                lost = True
                log.error("%s was taken over by %s, which took this process for dead: it ends", run_dir, _name(found))
                os.kill(os.getpid(), signal.SIGINT)
            return
        sign["beat"] += 1
        storage.write_bytes(path, json.dumps(sign).encode())

    beating = Every(PERIOD_S, beat, "presence")
    try:
        with _interruptible(lambda: lost):
            yield lambda: beating.close() and not lost and ours()
    finally:
        if beating.close() and not lost:
            with suppress(InputError, RunError, OSError):
                if ours():
                    storage.delete(path)
                    # A sign of life that was under way when the folder was removed has made it anew.
                    if made and not storage.list_files(run_dir) and not storage.list_dirs(run_dir):
                        storage.delete(run_dir)


@contextmanager
def _interruptible(wanted: Callable[[], bool]) -> Generator[None, None, None]:
    """Where SIGINT is ignored, as a shell has it for what it starts in the background: heard meanwhile if it is `wanted`."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(*_: object) -> None:
        if wanted():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def stop_run(run_dir: str, reason: str) -> str:
    """Ask whoever trains the run to save it and stop; returns who that is.

    Raises:
        InputError: there is no run, or nobody trains it: none gives a sign of life. Then no request stays behind.
    """
    read_run(run_dir)
    path = storage.join(run_dir, PRESENCE_NAME)
    if (found := _content(path)) is not None:
        request_stop(run_dir, reason)
        last, lives = _watched(run_dir, path)
        if lives or last is None:  # gone: it has stopped already
            return _name(_parsed(found))
        withdraw_stop(run_dir)
    raise InputError(f"nobody trains {run_dir}, so there is nothing to stop: `ctrsink train --resume` goes on with the run")


def _take(run_dir: str, path: str, sign: dict[str, Any]) -> None:
    content = json.dumps(sign).encode()
    while not storage.create(path, content):
        last, lives = _watched(run_dir, path)
        if lives:
            raise InputError(_held_by(run_dir, _parsed(last or b"")))
        if last is None or _content(path) != last:
            continue  # gone, or somebody was faster: once more from the beginning
        storage.write_bytes(path, content)
        time.sleep(SETTLE_S)  # of several that waited for the same death the last to write goes on
        if (found := _sign_of_life(path)) != sign:
            raise InputError(_held_by(run_dir, found))
        return


def _watched(run_dir: str, path: str) -> tuple[bytes | None, bool]:
    """The holder's last sign of life, None where it has gone, and whether that came while one looked, which is long enough."""
    last = _content(path)
    if last is not None:
        log.info("%s held %s last: waiting %g s for a sign of life", _name(_parsed(last)), run_dir, PATIENCE * PERIOD_S)
    until = time.monotonic() + PATIENCE * PERIOD_S
    while last is not None and time.monotonic() < until:
        time.sleep(PERIOD_S / 5)
        asked = time.monotonic()
        now = _content(path)
        if now is not None and now != last:
            return now, True
        if time.monotonic() - asked > PERIOD_S:  # the storage was away, and so for the holder
            until = time.monotonic() + PATIENCE * PERIOD_S
        last = now
    return last, False


def _held_by(run_dir: str, found: dict[str, Any] | None) -> str:
    return (
        f"{run_dir} is being trained by {_name(found)}: end that with `ctrsink stop --run {run_dir}`, and resume the run when it "
        "has ended"
    )


def _name(found: dict[str, Any] | None) -> str:
    return f"process {found['process']} on host {found['host']}" if found else "another process"


def _sign_of_life(path: str) -> dict[str, Any] | None:
    content = _content(path)
    return None if content is None else _parsed(content)


def _content(path: str) -> bytes | None:
    try:
        return storage.read_bytes(path)
    except FileNotFoundError:
        return None


def _parsed(content: bytes) -> dict[str, Any] | None:
    with suppress(ValueError):
        found = json.loads(content)
        if isinstance(found, dict) and {"host", "process"} <= found.keys():
            return found
    return None
