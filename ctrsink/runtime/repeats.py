"""A failure that comes back word for word in the same step: starting the workers again does not mend it."""

import json

from ctrsink import storage
from ctrsink.errors import InputError, PeerLost, RunError, StorageUnavailable
from ctrsink.train.rundir import FAILURE_NAME

TIMES = 3


def record(run_dir: str, error: InputError | RunError) -> None:
    """Count a failure of this rank; what only passes (a peer or the storage that is away) does not count."""
    if isinstance(error, PeerLost | StorageUnavailable):
        return
    times, message = _read(run_dir)
    times = times + 1 if message == str(error) else 1
    storage.write_bytes(storage.join(run_dir, FAILURE_NAME), json.dumps({"times": times, "message": str(error)}).encode())


def given_up(run_dir: str) -> str | None:
    """The failure that has come back so often that the run ends; messages name the step, so they were of the same one."""
    times, message = _read(run_dir)
    return f"{message} ({times} times)" if times >= TIMES else None


def forget(run_dir: str) -> None:
    """A new start by the user is a new try."""
    storage.delete(storage.join(run_dir, FAILURE_NAME))


def _read(run_dir: str) -> tuple[int, str]:
    try:
        found = json.loads(storage.read_bytes(storage.join(run_dir, FAILURE_NAME)))
        return int(found["times"]), str(found["message"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0, ""
