"""A failure that comes back word for word in the same step: starting the workers again does not mend it."""

import json
import logging

from ctrsink import storage
from ctrsink.errors import InputError, PeerLost, RunError, StorageUnavailable
from ctrsink.train.rundir import FAILURES_NAME

TIMES = 3
log = logging.getLogger("ctrsink.train")


def record(run_dir: str, rank: int, error: InputError | RunError) -> None:
    """Count a failure of this rank; what only passes (a peer or the storage that is away) does not count.

    Each rank has a file of its own: where all fail at once, none of them writes over another's count.
    """
    if isinstance(error, PeerLost | StorageUnavailable):
        return
    path = storage.join(run_dir, FAILURES_NAME, f"rank-{rank}.json")
    try:
        times, message = _read(path)
        times = times + 1 if message == str(error) else 1
        storage.write_bytes(path, json.dumps({"times": times, "message": str(error)}).encode())
    except (InputError, RunError, OSError) as unwritten:  # what went wrong first is told
        log.warning("the failure is not counted: %s", unwritten)


def given_up(run_dir: str) -> str | None:
    """The failure that has come back so often that the run ends; messages name the step, so they were of the same one."""
    folder = storage.join(run_dir, FAILURES_NAME)
    for name in storage.list_files(folder):
        times, message = _read(storage.join(folder, name))
        if times >= TIMES:
            return f"{message} ({times} times)"
    return None


def forget(run_dir: str) -> None:
    """A new start by the user is a new try."""
    storage.delete(storage.join(run_dir, FAILURES_NAME))


def _read(path: str) -> tuple[int, str]:
    try:
        found = json.loads(storage.read_bytes(path))
        return int(found["times"]), str(found["message"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0, ""
