"""Measure the model of a run again, in this process, without Ray and DeepSpeed."""

from ctrsink.config.train import Split
from ctrsink.dist import Topology
from ctrsink.errors import Diverged, InputError
from ctrsink.evaluate.evaluator import evaluate_splits
from ctrsink.train.restore import restore_run


def evaluate_run(run_dir: str, splits: tuple[Split, ...], step: int | None = None) -> dict[str, dict[str, float]]:
    """Metrics by split of the run's checkpoint `step` (default: the latest), also written to `evaluation/` in the run's folder.

    In fp32 on the CPU, whatever the run trained in.

    Raises:
        InputError: there is no such run or checkpoint, its predictions are not finite, or the data set is not what it was.
    """
    run = restore_run(run_dir, step)
    spec = run.spec.evaluate.model_copy(update={"splits": splits})
    forward = lambda batch: run.model(batch, run.objective)  # noqa: E731
    try:
        return evaluate_splits(forward, run.dataset, run.layout, spec, run_dir, run.checkpoint.step, Topology())
    except Diverged as error:
        raise InputError(
            f"{run_dir}, checkpoint of step {run.checkpoint.step}: {error}; name another with --checkpoint"
        ) from None
