"""A run's folder is held by the process that started it, so that no two train one run: they would write over each other."""

import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

from ctrsink import storage
from ctrsink.errors import InputError, RunError
from ctrsink.runtime.every import Every
from ctrsink.train.rundir import PRESENCE_NAME

PERIOD_S = 5.0
PATIENCE = 3
"""Periods without a sign of life after which the holder counts as dead."""
SETTLE_S = 1.0
log = logging.getLogger("ctrsink.train")


@contextmanager
def held(run_dir: str) -> Generator[None, None, None]:
    """Hold the run's folder meanwhile, by a file with a sign of life in it, a new one every PERIOD_S.

    No clock of another host is compared: a holder is alive if its file changes while one looks. The process that starts a run
    holds it, not the workers: they die with it, and may be started again while it lives.

    Raises:
        InputError: another process holds it, and lives.
    """
    path = storage.join(run_dir, PRESENCE_NAME)
    sign = {"host": socket.gethostname(), "process": os.getpid(), "token": secrets.token_hex(8), "beat": 0}
    _take(run_dir, path, sign)

    def beat() -> None:
        sign["beat"] += 1
        storage.write_bytes(path, json.dumps(sign).encode())

    beating = Every(PERIOD_S, beat, "presence")
    try:
        yield
    finally:
        if beating.close():
            with suppress(InputError, RunError, OSError):
                if (_sign_of_life(path) or {}).get("token") == sign["token"]:
                    storage.delete(path)


def _take(run_dir: str, path: str, sign: dict[str, Any]) -> None:
    content = json.dumps(sign).encode()
    if storage.create(path, content):
        return
    _until_dead(run_dir, path)
    storage.write_bytes(path, content)
    time.sleep(SETTLE_S)  # of several that waited for the same death the last to write goes on
    if (found := _sign_of_life(path)) != sign:
        raise InputError(_held_by(run_dir, found))


def _until_dead(run_dir: str, path: str) -> None:
    """Return when the holder has gone, or has given no sign of life for long enough."""
    found = _sign_of_life(path)
    if found is not None:
        who = f"process {found['process']} on host {found['host']}"
        log.info("%s held %s last: waiting %g s for a sign of life", who, run_dir, PATIENCE * PERIOD_S)
    until = time.monotonic() + PATIENCE * PERIOD_S
    while found is not None and time.monotonic() < until:
        time.sleep(PERIOD_S / 5)
        now = _sign_of_life(path)
        if now is not None and now != found:
            raise InputError(_held_by(run_dir, now))
        found = now


def _held_by(run_dir: str, found: dict[str, Any] | None) -> str:
    who = f"process {found['process']} on host {found['host']}" if found else "another process"
    return f"{run_dir} is being trained by {who}: end that with `ctrsink stop --run {run_dir}` before you resume the run"


def _sign_of_life(path: str) -> dict[str, Any] | None:
    try:
        found = json.loads(storage.read_bytes(path))
        return found if isinstance(found, dict) and {"host", "process"} <= found.keys() else None
    except (FileNotFoundError, ValueError):
        return None
