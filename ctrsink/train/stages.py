"""The stage controller: which stage a run is in, how fast it learns and when it ends; all of its state is a small dict."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ctrsink.config import RunSpec
from ctrsink.config.stages import ScheduleSpec, StageSpec
from ctrsink.errors import InputError

FALLING = frozenset({"logloss"})  # metrics that improve downwards


@dataclass(frozen=True)
class StageState:
    """Where a run is among its stages."""

    index: int = 0
    step: int = 0
    """Optimiser steps that the run has made."""
    first: int = 0
    """Of these, in earlier stages."""
    best: float | None = None
    """Of the metric of the stage's plateau."""
    stale: int = 0
    """Validations since then."""


class StageController:
    """Goes through the stages of a run, step by step.

    Every rank has one and tells it the same, so they agree without a message.

    Args:
        spec: the run.
        sequences: size of the train split.

    Raises:
        InputError: in chronological order the earlier stages leave nothing for the last.
    """

    def __init__(self, spec: RunSpec, sequences: int) -> None:
        self._stages = spec.stages
        self._lengths = lengths(spec, sequences)
        self._state = StageState()

    @property
    def stage(self) -> StageSpec:
        """The stage that the run is in; after the end the last."""
        return self._stages[self._state.index]

    @property
    def step(self) -> int:
        """Optimiser steps that the run has made."""
        return self._state.step

    @property
    def finished(self) -> bool:
        """Whether the last stage has ended."""
        return self.ended and self._state.index == len(self._stages) - 1

    @property
    def ended(self) -> bool:
        """Whether the present stage has ended; `advance` begins the next."""
        state, plateau, length = self._state, self.stage.plateau, self._lengths[self._state.index]
        met = [] if length is None else [state.step - state.first >= length]
        if plateau is not None:
            met.append(state.stale >= plateau.patience)
        return any(met) if self.stage.until == "any" else all(met)

    @property
    def last_step(self) -> int | None:
        """Steps of the run when all stages have ended by `steps` and `epochs`; None where a plateau alone ends one of them.

        A plateau beside them ends it sooner or, with `until: all`, later.
        """
        lengths = self._lengths[self._state.index :]
        return None if None in lengths else self._state.first + sum(length or 0 for length in lengths)

    def factor(self) -> float:
        """Factor of the learning rates in the next optimiser step."""
        state = self._state
        return schedule(self.stage.schedule, state.step - state.first, self._lengths[state.index])

    def after_step(self) -> None:
        """Take notice of one more step."""
        self._state = replace(self._state, step=self._state.step + 1)

    def observe(self, metrics: dict[str, float]) -> None:
        """Take notice of what a validation measured after the last step.

        Raises:
            InputError: the sample does not have the metric of the stage's plateau.
        """
        plateau, state = self.stage.plateau, self._state
        if plateau is None:
            return
        value = metrics[plateau.metric]
        if not math.isfinite(value):
            raise InputError(
                f"stages.{self.stage.name}: plateau: the validation sample has no {plateau.metric}, for example because all its "
                "labels are equal: take more train.validation.sequences, or logloss"
            )
        better = state.best is None or improvement(plateau.metric, value, state.best) > plateau.min_delta
        self._state = replace(state, best=value, stale=0) if better else replace(state, stale=state.stale + 1)

    def advance(self) -> None:
        """Leave a stage that has ended for the next, if there is one."""
        if self.ended and not self.finished:
            self._state = StageState(self._state.index + 1, self._state.step, first=self._state.step)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on."""
        return asdict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._state = StageState(**state)


def improvement(metric: str, new: float, old: float) -> float:
    """How much better `new` is than `old`; below 0 where it is worse, nan where one is."""
    return old - new if metric in FALLING else new - old


def lengths(spec: RunSpec, sequences: int) -> list[int | None]:
    """Optimiser steps of each stage as far as `steps` and `epochs` say; None where only a plateau ends it.

    A stage of `epochs` takes `ceil(epochs * sequences / batch_size)` steps: its last batch reaches into the next epoch, whose
    remaining sequences the next stage goes on with. In chronological order the last stage ends with the last whole batch.

    Raises:
        InputError: in chronological order the earlier stages leave nothing for the last.
    """
    found: list[int | None] = []
    for stage in spec.stages:
        # Rounded, because a product such as 1.1 x 100 lies a hair above the number that is meant.
        epochs = round((stage.epochs or 0) * sequences, 6) / spec.batch_size(stage)
        given = ([stage.steps] if stage.steps is not None else []) + (
            [max(1, math.ceil(epochs))] if stage.epochs is not None else []
        )
        found.append(None if not given else min(given) if stage.until == "any" else max(given))
    if spec.data.order == "chronological":
        last = spec.stages[-1]
        before = sum((length or 0) * spec.batch_size(stage) for stage, length in zip(spec.stages, found[:-1], strict=False))
        left = max(0, sequences - before) // spec.batch_size(last)
        if left == 0:
            raise InputError(
                f"{sequences} sequences, and the stages before {last.name} take {before} of them: that leaves no batch of "
                f"{spec.batch_size(last)}; give them fewer, or append to the data set"
            )
        found[-1] = left
    return found


def schedule(spec: ScheduleSpec, step: int, steps: int | None) -> float:
    """Linear warm-up from 0, then constant, linear or cosine down to `spec.final` at the last of `steps`, where it stays."""
    if steps is None:
        return 1.0
    warmup = round(spec.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    match spec.kind:
        case "constant":
            return 1.0
        case "linear":
            return 1 - (1 - spec.final) * done
        case "cosine":
            return spec.final + (1 - spec.final) * (1 + math.cos(math.pi * done)) / 2
