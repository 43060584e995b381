"""One measurement of one contestant, in a process of its own: `python -m benchmarks.stream_job JOB TASK [OPTIONS]`, both JSON."""

import gc
import json
import sys
import time
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.contestants import CONTESTANTS, Task, source, write_state
from benchmarks.impressions import tensors
from ctrsink.sequences.batch import Batch, Targets
from ctrsink.stream.stream import SequenceSource


def speed(task: Task, seed: int, warmup: int, seconds: float) -> dict[str, Any]:
    """Impressions/s after `warmup` batches, until `seconds` have passed or 95 % of the epoch are read: its end is not timed."""
    open_, _ = CONTESTANTS[task.contestant]
    batches = open_(task, seed, 0.0)
    read = sum(next(batches).impressions for _ in range(warmup))
    most, counted = int(0.95 * task.total) - task.batch_size - read, 0
    began = now = time.perf_counter()
    while now - began < seconds and counted < most:
        counted += next(batches).impressions
        now = time.perf_counter()
    return {"impressions": counted, "seconds": now - began, "impressions_per_s": counted / (now - began)}


def first(task: Task, seed: int, share: float) -> dict[str, Any]:
    """Seconds from nothing but the imported library to the first batch, at the epoch's start and at `share` of it."""
    open_, _ = CONTESTANTS[task.contestant]
    found = []
    # The first round is the warm-up: what is imported, connected or started once per process.
    for number, at in enumerate((0.0, 0.0, share)):
        began = time.perf_counter()
        batches = open_(task, seed + 2 - number, at)
        next(batches)
        found.append(time.perf_counter() - began)
        del batches
        gc.collect()
    return {"start_s": found[1], "resume_s": found[2]}


def state(task: Task, seed: int, share: float) -> dict[str, Any]:
    """Go to `share` of the epoch, untimed, and keep the state there for `first`."""
    write_state(task, seed, share)
    return {}


def check(task: Task, seed: int, count: int) -> dict[str, Any]:
    """Compare `count` batches, tensor by tensor, with what ours builds of the same impressions.

    Raises:
        SystemExit: a tensor differs.
    """
    open_, _ = CONTESTANTS[task.contestant]
    batches = open_(task, seed, 0.0)
    ours = source(task)
    compared = 0
    for _ in range(count):
        batch = next(batches)
        _require_equal(task, batch, ours.build(_ids(ours, batch.targets, task.total)))
        compared += batch.impressions
    return {"impressions": compared}


def _ids(ours: SequenceSource, targets: Targets, total: int) -> np.ndarray:
    """The numbers of the sequences of one target each that these are of: users and their events ascend with them."""
    owners, users, events = ours.owners(np.arange(total))[0], targets.users.numpy(), targets.events.numpy()
    low, high = np.searchsorted(owners, users, "left"), np.searchsorted(owners, users, "right")
    while (low < high - 1).any():
        middle = np.where(low < high - 1, (low + high) // 2, low)
        after = ours.build(middle).targets.events.numpy() > events
        low, high = np.where(after, low, middle), np.where(after, middle, high)
    return low


def _require_equal(task: Task, found: Batch, wanted: Batch) -> None:
    theirs = tensors(found)
    for name, b in tensors(wanted).items():
        a = theirs[name]
        if a.dtype != b.dtype or not torch.equal(a, b):
            raise SystemExit(f"{task.contestant} yields another {name} than ours: {a.dtype} {a.shape}, {b.dtype} {b.shape}")


def memory(task: Task, seed: int, marks: list[int]) -> dict[str, Any]:
    """Resident bytes of this process after so many batches, over as many epochs as that takes."""
    open_, _ = CONTESTANTS[task.contestant]
    found = {}
    for number, _ in enumerate(open_(task, seed, 0.0), start=1):
        if number in marks:
            gc.collect()
            found[str(number)] = psutil.Process().memory_info().rss
        if number >= max(marks):
            return found
    raise SystemExit(f"{task.contestant} ended before batch {max(marks)}")


JOBS = {job.__name__: job for job in (speed, first, state, check, memory)}


def main() -> None:
    """Run the job and print its result as the last line."""
    name, task, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    task["signals"] = tuple(task["signals"])
    result = JOBS[name](Task(**task), **options)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
