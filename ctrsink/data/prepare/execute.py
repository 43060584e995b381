"""How the tasks of a preparation are run."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

Task: TypeAlias = Callable[[int], int]
Execute: TypeAlias = Callable[[Task, Sequence[int]], Iterator[int]]
"""Runs the task on each number, perhaps many at a time and elsewhere, and gives the results in the order of the numbers."""


def in_process(task: Task, numbers: Sequence[int]) -> Iterator[int]:
    """One task after the other, here."""
    return map(task, numbers)
