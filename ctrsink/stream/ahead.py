"""Values made before they are asked for, by a thread or by processes, and handed out in their order."""

import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import torch
import torch.utils.data

from ctrsink.dataset.background import ending, start
from ctrsink.errors import InputError, RunError, first_line

T = TypeVar("T")


def read_ahead(make: Callable[[int], T], count: int, depth: int = 2) -> Iterator[T]:
    """`make(0) .. make(count - 1)`, at most `depth` of them made before they are asked for; an error is raised in its turn."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def work() -> None:
        for i in range(count):
            try:
                made: tuple[T | None, BaseException | None] = (make(i), None)
            except BaseException as error:
                made = (None, error)
            while not (stopped.is_set() or ending.is_set()):
                try:
                    ready.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stopped.is_set() or ending.is_set() or made[1] is not None:
                return

    start(work, "ctrsink-read-ahead")
    try:
        for _ in range(count):
            value, error = ready.get()
            if error is not None:
                raise error
            yield value  # pyright: ignore[reportReturnType]
    finally:
        stopped.set()


def in_processes(make: Callable[[int], T], count: int, workers: int) -> Iterator[T]:
    """`make(0) .. make(count - 1)`, value i made by process `i % workers`; each keeps two ready.

    The processes are new ones (no fork: this one has threads) that import what `make` needs and nothing else. `make` is sent to
    them; what it returns comes back by value.

    Raises:
        InputError: the one that `make` raised, in its turn.
        RunError: a process was killed, by the system for want of memory for one.
        RuntimeError: another error in `make`.
    """
    loader = torch.utils.data.DataLoader(
        _Made(make, count),
        batch_size=None,
        sampler=range(count),
        num_workers=workers,
        multiprocessing_context="spawn",
        collate_fn=_same,
        worker_init_fn=_settle,
        generator=torch.Generator(),  # else the loader would draw a number from the generator of this process
    )
    with _no_main_module():
        made = iter(loader)
    try:
        for value, error in made:
            if error is not None:
                raise error
            yield value
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        raise RunError(
            f"{first_line(error)}: give it more memory, or take fewer of data.workers and data.shuffle_shards"
        ) from None
    finally:
        del made  # ends the processes


class _Made(torch.utils.data.Dataset[Any], Generic[T]):
    def __init__(self, make: Callable[[int], T], count: int) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[T | None, InputError | None]:
        try:
            return self.make(index), None
        except InputError as error:  # as a value: the loader would make a page of its one line
            return None, error


def _same(value: T) -> T:
    return value


def _settle(_: int) -> None:
    """What a process does first: leave Ctrl-C to the one that started it, take one core, send tensors by value.

    Torch would send each tensor as a file of shared memory: thousands of open files, in a /dev/shm that containers keep small.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    ForkingPickler.register(torch.Tensor, _by_value)


def _by_value(tensor: torch.Tensor) -> tuple[Callable[[np.ndarray], torch.Tensor], tuple[np.ndarray]]:
    return torch.from_numpy, (tensor.numpy(),)


@contextmanager
def _no_main_module() -> Iterator[None]:
    """A new process imports the main module of its parent: the program that trains, Ray and DeepSpeed with it. Hide it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
