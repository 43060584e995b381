"""Ray Data runs tasks that are numbered: on this machine's cores or on a cluster, repeated where a worker dies."""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.exceptions import RayError, RayTaskError

from ctrsink import logs
from ctrsink.errors import InputError, RunError, first_line
from ctrsink.prepare.execute import Execute, Task
from ctrsink.runtime.process import prepare_process
from ctrsink.runtime.ray_train import connect

log = logging.getLogger("ctrsink.data")


def ray_data(address: str | None, workers: int) -> Execute:
    """At most `workers` tasks at a time, a core each, on the cluster at `address` or one that is started here.

    Raises:
        InputError: the cluster cannot be reached.
    """
    hint = "; if memory ran out, lower prepare.workers, block_bytes or shard_events"
    return _executing(address, workers, hint, compute=TaskPoolStrategy(size=workers), num_cpus=1)


def ray_data_actors(address: str | None, workers: int, cpus: int, device: str) -> Execute:
    """As `ray_data`, for tasks that keep something of size, as a model: `workers` processes run them, one task at a time each.

    Args:
        cpus: threads of each.
        device: what each is to have; of `cuda` one.

    Raises:
        InputError: the cluster cannot be reached.
    """
    gpus = {"num_gpus": 1} if device == "cuda" else {}
    actors = ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2)
    hint = "; if memory ran out, lower --workers or --block-bytes"
    return _executing(address, workers * cpus, hint, (device, cpus), compute=actors, num_cpus=cpus, **gpus)


def _executing(address: str | None, cpus: int, hint: str, process: tuple[str, int] | None = None, **place: Any) -> Execute:
    """Run tasks at the `place` that Ray Data's `map` takes; actors among them are prepared for a device and so many threads."""
    connect(address, cpus)
    require_place(place.get("num_cpus", 0), place.get("num_gpus", 0), joined=bool(address or os.environ.get("RAY_ADDRESS")))
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.raise_original_map_exception = True

    def execute(task: Task, numbers: Sequence[int]) -> Iterator[int]:
        if not numbers:
            return
        rows = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
        # Of a class Ray makes an object in each actor.
        run: Any = _Row(task, logs.of_workers()) if process is None else _Row
        given = {} if process is None else {"fn_constructor_args": (task, logs.of_workers(), process)}
        done = rows.map(run, **given, **place)
        try:
            for row in done.iter_rows():
                yield row["number"]
        except RayError as error:
            raise _translate(error, hint) from error

    return execute


def require_place(cpus: float, gpus: float, joined: bool) -> None:
    """A task that has no place anywhere would be waited for without a word and without end.

    Args:
        joined: the cluster was there before, and may grow: then it is only warned.

    Raises:
        InputError: no cluster that was started here has such a place.
    """
    has = ray.cluster_resources()
    lack = [
        f"{wanted:g} {name} ({has.get(name, 0):g})"
        for name, wanted in (("CPU", cpus), ("GPU", gpus))
        if has.get(name, 0) < wanted
    ]
    if not lack:
        return
    told = f"a worker needs {' and '.join(lack)} of what the cluster has (in brackets)"
    if not joined:
        raise InputError(f"{told}: ask for less, or name a cluster that has it")
    log.warning("%s: waiting for a node that brings it", told)


class _Row:
    """A task on a row of Ray Data."""

    def __init__(self, task: Task, log_format: str, process: tuple[str, int] | None = None) -> None:
        self.task, self.log_format = task, log_format
        if process is not None:
            prepare_process(*process)

    def __call__(self, row: dict[str, int]) -> dict[str, int]:
        os.environ[logs.FORMAT_VARIABLE] = self.log_format
        logs.configure(logging.WARNING)
        return {"number": self.task(int(row["number"]))}


def _translate(error: RayError, hint: str) -> Exception:
    """The task's own error."""
    cause: BaseException | None = error
    while cause is not None:
        # Ray makes an error that is of both types, and adds lines of its own to the message.
        if isinstance(cause, InputError | RunError) and not isinstance(cause, RayError):
            return type(cause)(first_line(cause))
        cause = getattr(cause, "cause", None) or cause.__cause__
    hint = "" if isinstance(error, RayTaskError) else hint
    return RunError(f"a task failed: {type(error).__name__}: {str(error).strip().splitlines()[-1]}{hint}")
