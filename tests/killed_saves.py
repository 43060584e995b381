"""Saves a checkpoint and is killed at every point of it: `python -m tests.killed_saves BASE`, one fork per point.

Each point gets a run BASE/<number> with checkpoints of steps 10 (the best) and 20 and remains of step 15; the process that is
killed saves step 30 and then deletes what need not stay. Prints what the points were.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from ctrsink import storage
from ctrsink.config.train import KeepSpec
from ctrsink.storage import local, s3
from ctrsink.train.checkpoint.checkpoint import FILES, Checkpoint, folder_of, save_checkpoint, write_files
from ctrsink.train.checkpoint.writer import CheckpointWriter

KEEP = KeepSpec(last=1, best="auc")
AUC = {10: 0.9, 20: 0.5, 30: 0.6, 40: 0.6}


def make(step: int) -> Checkpoint:
    """Step 30 is large enough for an upload in parts of the smallest size that S3 allows."""
    weight = torch.full((840, 840 if step == 30 else 1), float(step))
    moments = {"w/exp_avg": weight * 2, "w/exp_avg_sq": weight * 3}
    return Checkpoint(step, 8 * step, {"w": weight}, moments, {"head/decay": step}, "0" * 64, metrics={"auc": AUC[step]})


def prepare(run_dir: str) -> None:
    for step in (10, 20):
        save_checkpoint(run_dir, make(step))
    write_files(folder_of(run_dir, 15), make(20), FILES[:2])


class Points:
    """Counts the points that the work passes, and ends the process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at, self.passed = kill_at, list[str]()

    def __call__(self, name: str) -> None:
        if len(self.passed) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed.append(name)

    def plant(self) -> None:
        """Before and behind each write and deletion, in the middle of both, and before each request that changes something."""
        write, delete, write_at, request = storage.write_bytes, storage.delete, local.write_at, s3.Operation.request

        def write_bytes(uri: str, content: Any) -> None:
            self(f"before {_short(uri)}")
            write(uri, content)
            self(f"behind {_short(uri)}")

        def in_half(handle: int, content: Any, start: int) -> None:
            half = len(content) // 2
            write_at(handle, content[:half], start)
            self("between two bytes")
            write_at(handle, content[half:], start + half)

        def delete_slowly(uri: str) -> None:
            self(f"before the deletion of {_short(uri)}")
            files = storage.find(uri)
            if files:
                delete(storage.join(uri, files[0].path))
                self(f"in the deletion of {_short(uri)}")
            delete(uri)

        async def watched(operation: Any, method: str, **arguments: Any) -> Any:
            if method.partition("_")[0] not in ("get", "list"):
                self(f"before {method}")
            return await request(operation, method, **arguments)

        patches: dict[tuple[Any, str], Callable[..., Any]] = {
            (storage, "write_bytes"): write_bytes,
            (storage, "delete"): delete_slowly,
            (local, "write_at"): in_half,
            (s3.Operation, "request"): watched,
        }
        for (place, name), patch in patches.items():
            setattr(place, name, patch)
        s3.PART_BYTES = 5 * 2**20


def _short(uri: str) -> str:
    return "/".join(uri.split("/")[-2:])


def attempt(run_dir: str, kill_at: int | None) -> tuple[int, list[str]]:
    """Save step 30 in a fork; returns its exit status and the points that it passed, where it got to tell them."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        prepare(run_dir)
        points = Points(kill_at)
        points.plant()
        writer = CheckpointWriter(run_dir, KEEP)
        writer.save(make(30))
        writer.wait()
        os.write(write, json.dumps(points.passed).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    return os.waitpid(pid, 0)[1], json.loads(told or b"[]")


def numbers(base: str, points: list[str]) -> range:
    """Of the points that a run is killed at: all on disk, every other one on S3, where each takes half a second."""
    return range(0, len(points), 2 if storage.is_remote(base) else 1)


def main(base: str) -> None:
    status, points = attempt(f"{base}/whole", None)
    assert status == 0
    for number in numbers(base, points):
        status, _ = attempt(f"{base}/{number}", number)
        assert os.WTERMSIG(status) == signal.SIGKILL, (number, status)
    print(json.dumps(points))


if __name__ == "__main__":
    main(sys.argv[1])
