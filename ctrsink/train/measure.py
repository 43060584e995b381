"""Measure the model of a run again, in this process, without Ray and DeepSpeed."""

from collections.abc import Generator
from contextlib import contextmanager

from ctrsink.config.train import Split
from ctrsink.dist import Topology
from ctrsink.errors import Diverged, InputError
from ctrsink.evaluate.evaluator import evaluate_splits
from ctrsink.run.listing import Step
from ctrsink.train.restore import restore_run


def evaluate_run(run_dir: str, splits: tuple[Split, ...], step: Step = None) -> dict[str, dict[str, float]]:
    """Metrics by split of the run's checkpoint `step` (default: the latest), also written to `evaluation/` in the run's folder.

    In fp32 on the CPU, whatever the run trained in.

    Raises:
        InputError: there is no such run or checkpoint, its predictions are not finite, or the data set is not what it was.
    """
    run = restore_run(run_dir, step)
    spec = run.spec.evaluate.model_copy(update={"splits": splits})
    forward = lambda batch: run.model(batch, run.objective)  # noqa: E731
    with naming(run_dir, run.checkpoint.step):
        return evaluate_splits(forward, run.dataset, run.layout, spec, run_dir, run.checkpoint.step, Topology())


@contextmanager
def naming(run_dir: str, step: int) -> Generator[None, None, None]:
    """A checkpoint that predicts what is not finite is a wrong one to ask for."""
    try:
        yield
    except Diverged as error:
        raise InputError(f"{run_dir}, checkpoint of step {step}: {error}; name another with --checkpoint") from None
