"""A signature beside a checkpoint's marker: that whoever wrote it knew the key, which hashes alone do not say.

Whoever may write into a run's folder may change a file and its hash with it, and native shards are pickles, which run programs.
With a key in the environment of every process of a run, only checkpoints that were signed with it are opened.
"""

import hmac
import os

from ctrsink import storage

KEY = "CTRSINK_CHECKPOINT_KEY"
"""Environment variable; the same secret for all who write or read the run's checkpoints."""
NAME = "complete.hmac"


def is_asked() -> bool:
    """Whether there is a key, so that whoever else may write to the run's folder is not trusted."""
    return bool(os.environ.get(KEY))


def sign(folder: str, marker: bytes) -> None:
    """Write the signature of a marker that is about to be written, where there is a key."""
    if key := os.environ.get(KEY):
        storage.write_bytes(storage.join(folder, NAME), _signature(key, folder, marker))


def distrusted(folder: str, marker: bytes) -> str | None:
    """Why the marker is not believed; None where it is, or where there is no key to ask."""
    key = os.environ.get(KEY)
    if not key:
        return None
    try:
        found = storage.read_bytes(storage.join(folder, NAME))
    except FileNotFoundError:
        return f"is not signed, and {KEY} is set: unset it only where you trust all who may write there"
    return None if hmac.compare_digest(found, _signature(key, folder, marker)) else f"is not signed with the key in {KEY}"


def _signature(key: str, folder: str, marker: bytes) -> bytes:
    step = folder.rstrip("/").rpartition("/")[2]  # so that no checkpoint stands in for a later one
    return hmac.digest(key.encode(), step.encode() + b"\0" + marker, "sha256").hex().encode()
