"""What was written is loaded again and must give the logits that the training model gives; else it is not published."""

from collections.abc import Callable

import numpy as np
import torch

from ctrsink.errors import InputError
from ctrsink.families.registry import source_of
from ctrsink.sequences.batch import Batch
from ctrsink.train.restore import TrainedRun

SEQUENCES = 4
TOLERANCES = {"fp32": 1e-5, "bf16": 0.05}
"""What a logit x may differ by, as a share of 1 + |x|; see docs/export.md for where they come from."""


def sample(run: TrainedRun) -> list[Batch]:
    """Sequences of the train split, a batch each: one that is long, and some from all over it."""
    source = source_of(run.dataset, "train", run.layout)
    spread = np.linspace(0, sum(source.per_shard) - 1, SEQUENCES - 1).astype(np.int64)
    return [source.build(ids[None]) for ids in np.unique(np.append(source.some(), spread))]


def trained_logits(run: TrainedRun, batches: list[Batch]) -> list[torch.Tensor]:
    """What the training model gives for each batch, fp32 [T].

    Raises:
        InputError: its predictions are not finite: finite weights may be so large that what they compute is not.
    """
    with torch.inference_mode():
        found = [run.model(batch, run.objective).logits for batch in batches]
    assert all(logits is not None for logits in found)  # by restore_run
    if not all(logits.isfinite().all() for logits in found):
        raise InputError(dead(run, "its predictions are not finite"))
    return found


def dead(run: TrainedRun, why: str) -> str:
    """Say that a checkpoint cannot be exported, `why`, and what can be done."""
    return (
        f"the checkpoint of step {run.checkpoint.step} of {run.spec.run_dir} is no model: {why}; name another with --checkpoint"
    )


def require_parity(
    model: Callable[[Batch], torch.Tensor], batches: list[Batch], expected: list[torch.Tensor], dtype: str
) -> float:
    """The greatest difference of a logit x of what was written, as a share of 1 + |x|.

    Raises:
        InputError: it is more than the tolerance of `dtype`, or not finite.
    """
    worst = 0.0
    for batch, trained in zip(batches, expected, strict=True):
        with torch.inference_mode():
            differences = (model(batch) - trained).abs() / (1 + trained.abs())
        worst = max(worst, float(differences.nan_to_num(torch.inf).max()))
    if worst > TOLERANCES[dtype]:
        narrower = "" if dtype == "fp32" else "; export it with --dtype fp32"
        raise InputError(
            f"what was written does not compute what was trained: a logit x differs by {worst:.2g} of 1 + |x|, and "
            f"{TOLERANCES[dtype]:g} is allowed in {dtype}; nothing was kept{narrower}"
        )
    return worst
