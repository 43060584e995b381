"""The stage plan: which stage an optimiser step belongs to and how fast it learns; pure functions of the configuration."""

import math
from dataclasses import dataclass

from ctrsink.config.stages import ScheduleSpec, StageSpec


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


def plan(stages: tuple[StageSpec, ...], sequences: int, batch_size: int) -> list[StageWindow]:
    """The windows of all stages, one after another.

    A stage of `epochs` takes `ceil(epochs * sequences / batch_size)` steps: its last batch reaches into the next epoch, whose
    remaining sequences the next stage goes on with.
    """
    windows: list[StageWindow] = []
    step = 0
    for index, stage in enumerate(stages):
        # Rounded, because a product such as 1.1 x 100 lies a hair above the number that is meant.
        steps = (
            stage.steps if stage.steps is not None else max(1, math.ceil(round((stage.epochs or 0) * sequences, 6) / batch_size))
        )
        windows.append(StageWindow(index, stage, step, step + steps))
        step += steps
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
