"""What is said of a run before its first step, because its result would look like one: too few steps, batches beyond the data."""

from ctrsink.config import RunSpec

FEW_STEPS = 300
"""With fewer most models are far from what they could learn."""


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
        largest, number = max((spec.batch_size(stage), -number) for number, stage in enumerate(spec.stages))
        smaller = max(1, largest * steps // FEW_STEPS)
        lower = f"lower {_batch_key(spec, -number)} from {largest} to {smaller} or so, or " if smaller < largest else ""
        found.append(
            f"the run makes {steps} optimiser step{'s' * (steps != 1)}, and with fewer than {FEW_STEPS} most models are "
            f"far from what they could learn: {lower}raise epochs or steps of the stages"
        )
    return found


def _batch_key(spec: RunSpec, number: int) -> str:
    return "train.batch_size" if spec.stages[number].batch_size is None else f"stages.{number}.batch_size"
