"""A failure that comes back word for word in the same step: starting the workers again does not mend it."""

import json
import logging
from contextlib import suppress
from typing import Any

from ctrsink import kept, storage
from ctrsink.errors import InputError, PeerLost, RunError, StorageUnavailable
from ctrsink.run.folder import FAILURES_NAME
from ctrsink.run.listing import list_checkpoints

TIMES = 3
log = logging.getLogger("ctrsink.train")


def record(run_dir: str, rank: int, error: InputError | RunError) -> None:
    """Count a failure of this rank; what only passes (a peer or the storage that is away) does not count.

    Each rank has a file of its own: where all fail at once, none of them writes over another's count. A run that has made another
    checkpoint since has come further, and the count begins anew.
    """
    if isinstance(error, PeerLost | StorageUnavailable):
        return
    path = storage.join(run_dir, FAILURES_NAME, f"rank-{rank}.json")
    try:
        failure = {"message": str(error), "behind": (list_checkpoints(run_dir) or [None])[0]}
        before = _read(path)
        times = before["times"] + 1 if before.items() >= failure.items() else 1
        storage.write_bytes(path, json.dumps(kept.stamped(failure | {"times": times})).encode())
    except (InputError, RunError, OSError) as unwritten:  # what went wrong first is told
        log.warning("the failure is not counted: %s", unwritten)


def given_up(run_dir: str) -> str | None:
    """The failure that has come back so often that the run ends."""
    folder = storage.join(run_dir, FAILURES_NAME)
    for name in storage.list_files(folder):
        failure = _read(storage.join(folder, name))
        if failure["times"] >= TIMES:
            return f"{failure['message']} ({failure['times']} times)"
    return None


def forget(run_dir: str) -> None:
    """A new start by the user is a new try."""
    storage.delete(storage.join(run_dir, FAILURES_NAME))


def _read(path: str) -> dict[str, Any]:
    with suppress(FileNotFoundError, ValueError):
        found = kept.opened(json.loads(storage.read_bytes(path)), path)
        if found.keys() == {"times", "message", "behind"}:
            return found
    return {"times": 0}
