"""Resident memory of a process and all that it started, each shared page counted once."""

import threading
from collections.abc import Iterable

import psutil


def resident(pid: int | None = None) -> int:
    """Bytes: the proportional set sizes (PSS) of the process `pid`, by default this one, and its descendants, summed.

    A page that n processes map counts 1/n for each of them, so the shared memory of Ray's object store is not counted twice.
    """
    root = psutil.Process(pid)
    return sum(map(_proportional, _tree(root)))


def _tree(root: psutil.Process) -> Iterable[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _proportional(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
        return 0  # it ended between being listed and being asked


class Peak:
    """Samples `resident(pid)` every `period` seconds in a thread; `stop` returns the highest sample in bytes."""

    def __init__(self, pid: int, period: float = 0.5) -> None:
        self._pid, self._period = pid, period
        self._highest = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="memory-peak")
        self._thread.start()

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self._highest

    def _watch(self) -> None:
        while not self._ended.wait(self._period):
            try:
                self._highest = max(self._highest, resident(self._pid))
            except psutil.NoSuchProcess:
                return
