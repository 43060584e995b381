"""The stage plan: which stage an optimiser step belongs to and how fast it learns; pure functions of the configuration."""

import math
from dataclasses import dataclass, replace

from ctrsink.config import RunSpec
from ctrsink.config.stages import ScheduleSpec, StageSpec
from ctrsink.errors import InputError


@dataclass(frozen=True)
class StageWindow:
    """A stage and its optimiser steps, `first <= step < end`."""

    index: int
    spec: StageSpec
    first: int
    end: int

    def factor(self, step: int) -> float:
        """Factor of the learning rates in optimiser step `step` (counted from 0 over the whole run)."""
        return schedule(self.spec.schedule, step - self.first, self.end - self.first)


def plan(spec: RunSpec, sequences: int) -> list[StageWindow]:
    """The windows of all stages, one after another; `sequences` is the size of the train split.

    A stage of `epochs` takes `ceil(epochs * sequences / batch_size)` steps: its last batch reaches into the next epoch, whose
    remaining sequences the next stage goes on with. In chronological order the last stage ends with the last whole batch.

    Raises:
        InputError: in chronological order the earlier stages leave nothing for the last.
    """
    windows: list[StageWindow] = []
    step, batch_size = 0, spec.train.batch_size
    for index, stage in enumerate(spec.stages):
        # Rounded, because a product such as 1.1 x 100 lies a hair above the number that is meant.
        steps = (
            stage.steps if stage.steps is not None else max(1, math.ceil(round((stage.epochs or 0) * sequences, 6) / batch_size))
        )
        windows.append(StageWindow(index, stage, step, step + steps))
        step += steps
    if spec.data.order == "chronological":
        last, end = windows[-1], sequences // batch_size
        if end <= last.first:
            raise InputError(
                f"{sequences} sequences are {end} batches of {batch_size}, but the stages before {last.spec.name} take "
                f"{last.first} steps: give them fewer, or append to the data set"
            )
        windows[-1] = replace(last, end=end)
    return windows


def schedule(spec: ScheduleSpec, step: int, steps: int) -> float:
    """Linear warm-up from 0, then constant, linear or cosine down to `spec.final` at the last step."""
    warmup = round(spec.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    match spec.kind:
        case "constant":
            return 1.0
        case "linear":
            return 1 - (1 - spec.final) * done
        case "cosine":
            return spec.final + (1 - spec.final) * (1 + math.cos(math.pi * done)) / 2
