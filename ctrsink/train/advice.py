"""What is said of a run before its first step, because its result would look like one: too few steps, batches beyond the data."""

from ctrsink.config import RunSpec

FEW_STEPS = 300
"""A model that made fewer has seldom learned more than the mean click rate."""


def advice(spec: RunSpec, sequences: int, steps: int | None) -> list[str]:
    """A line for each thing to change.

    Args:
        spec: the run.
        sequences: size of the train split.
        steps: optimiser steps of all stages; None where a plateau alone ends one of them.
    """
    found = [
        f"stages.{stage.name}: a batch of {spec.batch_size(stage)} sequences is larger than the train split, which has "
        f"{sequences}: every step repeats them; lower {_batch_key(spec, number)} to {max(1, sequences // 10)} or less"
        for number, stage in enumerate(spec.stages)
        if spec.batch_size(stage) > sequences
    ]
    if steps is not None and steps < FEW_STEPS:
        largest = max(spec.batch_size(stage) for stage in spec.stages)
        smaller = max(1, largest * steps // FEW_STEPS)
        lower = f"lower train.batch_size from {largest} to {smaller} or so, or " if smaller < largest else ""
        found.append(
            f"the run makes {steps} optimiser steps, and with fewer than {FEW_STEPS} a model seldom learns more than the mean "
            f"click rate: {lower}raise epochs or steps of the stages"
        )
    return found


def _batch_key(spec: RunSpec, number: int) -> str:
    return "train.batch_size" if spec.stages[number].batch_size is None else f"stages.{number}.batch_size"
