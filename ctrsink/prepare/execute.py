"""How the tasks of a preparation are run."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

from ctrsink.progress import Progress

log = logging.getLogger("ctrsink.data")
Task: TypeAlias = Callable[[int], int]
Execute: TypeAlias = Callable[[Task, Sequence[int]], Iterator[int]]
"""Runs the task on each number, perhaps many at a time and elsewhere, and gives the results in the order of the numbers."""


class Lasting(Protocol):
    """A task whose results are files, so that they outlast a preparation that is interrupted."""

    def __call__(self, number: int, /) -> int: ...

    def done(self) -> set[int]:
        """Numbers whose results are there."""
        ...


def in_process(task: Task, numbers: Sequence[int]) -> Iterator[int]:
    """One task after the other, here."""
    return map(task, numbers)


def _one_each(number: int) -> tuple[float, int]:
    return 1, 1


def run_tasks(
    task: Lasting,
    count: int,
    execute: Execute,
    what: str,
    take: Callable[[int], tuple[float, int]] = _one_each,
    total: float | None = None,
    before: str = "",
    unit: str = "rows",
) -> None:
    """Run the task on each number below `count` but those that an earlier preparation has run, and report the progress.

    Args:
        what: what the progress is said to be, see Progress.
        take: called with each number in order, as soon as its result is there; gives its work and its rows.
        total: work of all numbers; None: 1 each.
        before: what it means to be run already, such as `blocks have been read`; empty: it is not said.
        unit: what is counted.
    """
    done = task.done()
    if done and before:
        log.info("going on: %d of %d %s before", len(done), count, before)
    running = execute(task, [number for number in range(count) if number not in done])

    progress = Progress(log, what, count if total is None else total, unit)
    for number in range(count):
        if number not in done:
            next(running)
        progress.add(*take(number), number in done)
    progress.end()
