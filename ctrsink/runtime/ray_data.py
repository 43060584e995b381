"""Ray Data runs the tasks of a preparation: on this machine's cores or on a cluster, repeated where a worker dies."""

from collections.abc import Iterator, Sequence

import ray
from ray.data import DataContext, TaskPoolStrategy
from ray.exceptions import RayError, RayTaskError

from ctrsink.errors import InputError, RunError
from ctrsink.prepare.execute import Execute, Task
from ctrsink.runtime.ray_train import connect


def ray_data(address: str | None, workers: int) -> Execute:
    """At most `workers` tasks at a time, a core each, on the cluster at `address` or one that is started here.

    Raises:
        InputError: the cluster cannot be reached.
    """
    connect(address, workers)
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False

    def execute(task: Task, numbers: Sequence[int]) -> Iterator[int]:
        if not numbers:
            return
        rows = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
        done = rows.map(_Row(task), compute=TaskPoolStrategy(size=workers), num_cpus=1)
        try:
            for row in done.iter_rows():
                yield row["number"]
        except RayError as error:
            raise _translate(error) from error

    return execute


class _Row:
    """A task on a row of Ray Data."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, row: dict[str, int]) -> dict[str, int]:
        return {"number": self.task(int(row["number"]))}


def _translate(error: RayError) -> Exception:
    """The task's own error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return type(cause)(str(cause))
        cause = cause.__cause__ or getattr(cause, "cause", None)
    hint = "" if isinstance(error, RayTaskError) else "; if memory ran out, lower prepare.workers, block_bytes or shard_events"
    return RunError(f"a task of the preparation failed: {type(error).__name__}: {str(error).strip().splitlines()[-1]}{hint}")
