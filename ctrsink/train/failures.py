"""Failures of a training step, told with rank, step, stage and shards; one that only echoes another rank's is marked as such."""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager

from torch.distributed import DistError

from ctrsink.config.train import TrainSpec
from ctrsink.errors import Diverged, InputError, PeerLost, RunError, StorageUnavailable, first_line
from ctrsink.train.engine import StepResult

SKIPPED_IN_A_ROW = 10
_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")  # as gloo says it


@contextmanager
def located(where: Callable[[], str]) -> Generator[None, None, None]:
    """Put `where` it happened before the message of a failure inside; it is asked only then.

    Raises:
        InputError, RunError: instead of what was raised.
    """
    try:
        yield
    except (StorageUnavailable, InputError, RunError) as error:
        raise type(error)(f"{where()}: {error}") from error
    except Exception as error:
        told = f"{where()}: {type(error).__name__}: {first_line(error)}"
        lost = isinstance(error, DistError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST))
        raise (PeerLost if lost else RunError)(told) from error


class Finite:
    """Watches that steps are finite, by the policy `train.on_nonfinite`."""

    def __init__(self, spec: TrainSpec) -> None:
        self._skip = spec.on_nonfinite == "skip"
        self._in_a_row = 0

    def skips(self, result: StepResult, where: Callable[[], str]) -> str | None:
        """What to say of a step that was left out; None for a good one.

        Raises:
            Diverged: the policy does not let the run go on.
        """
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
            self._in_a_row = 0
            return None
        found = f"{where()}: the loss is {result.loss:g}, the gradient's norm {result.grad_norm:g}"
        self._in_a_row += 1
        # With a finite gradient the step was made all the same, and cannot be left out any more.
        if not self._skip or math.isfinite(result.grad_norm):
            raise Diverged(f"{found}: lower the learning rates, look at the data, or take train.on_nonfinite=skip")
        if self._in_a_row > SKIPPED_IN_A_ROW:
            raise Diverged(f"{found}, and so were {SKIPPED_IN_A_ROW} steps before: lower the learning rates or look at the data")
        return f"{found}; the step is left out"
