"""Checkpoints are written by a thread of their own, while training goes on."""

import logging
import threading
import time
from collections.abc import Callable

from ctrsink.config.train import KeepSpec
from ctrsink.errors import InputError, RunError
from ctrsink.train.checkpoint.checkpoint import Checkpoint, save_checkpoint
from ctrsink.train.checkpoint.retention import Keeper

TOLERATED = 2
"""Failed saves in a row that do not end a run."""
log = logging.getLogger("ctrsink.train")


class CheckpointWriter:
    """Saves one checkpoint at a time and then applies `keep`. Used by one thread of one process of the run.

    A save that fails with an error the user can act on is warned about and the run goes on, `tolerate` times in a row: an outage
    of the storage passes, the next checkpoint will do. The one after that is raised, by `save` or `wait`; any other error is, at
    once. The end of the interpreter waits for a save that is under way, at most as long as the storage's own deadlines are.

    Args:
        run_dir: where the checkpoints lie.
        keep: which of them stay.
        tolerate: failed saves in a row that do not end the run.
    """

    def __init__(self, run_dir: str, keep: KeepSpec, tolerate: int = TOLERATED) -> None:
        self.run_dir, self.tolerate = run_dir, tolerate
        self.seconds: float | None = None
        """How long the last finished save took, what it deleted included; None before the first."""
        self._keeper = Keeper(run_dir, keep)
        self._thread: threading.Thread | None = None
        self._unsaved: Checkpoint | None = None  # the last one, if it is not in the storage yet
        self._error: BaseException | None = None
        self._failures = 0

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, checkpoint: Checkpoint, first: Callable[[], object] | None = None) -> None:
        """Hand over a checkpoint and return at once; while the one before it is being saved, wait for that.

        Args:
            checkpoint: nobody changes it or its tensors any more.
            first: called by the thread before it writes.

        Raises:
            RunError, InputError: the save before failed, and so did too many before that.
        """
        self._join()
        self._judge()
        self._start(checkpoint, first)

    def wait(self) -> None:
        """Return when the last checkpoint is in the storage; one that failed is tried once more.

        Raises:
            RunError, InputError: it cannot be saved.
        """
        self._join()
        if self._unsaved is not None and isinstance(self._error, (RunError, InputError)):
            self._start(self._unsaved)
            self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _start(self, checkpoint: Checkpoint, first: Callable[[], object] | None = None) -> None:
        self._unsaved, self._error = checkpoint, None
        self._thread = threading.Thread(target=self._run, args=(checkpoint, first), name="checkpoint")
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _judge(self) -> None:
        """Raise the failure of the last save, unless it is one of those that are tolerated."""
        if self._error is None:
            return
        if not isinstance(self._error, (RunError, InputError)) or self._failures > self.tolerate:
            error, self._error = self._error, None
            raise error

    def _run(self, checkpoint: Checkpoint, first: Callable[[], object] | None) -> None:
        started = time.monotonic()
        try:
            if first is not None:
                first()
            folder = save_checkpoint(self.run_dir, checkpoint)
            self._unsaved, self._failures = None, 0
            self._keeper.apply(checkpoint.step)
            self.seconds = time.monotonic() - started
            log.info("checkpoint %s", folder)
        except (RunError, InputError) as error:
            # Raised by a later call, which is at another step.
            self._error = type(error)(f"the checkpoint of step {checkpoint.step} was not saved: {error}")
            self._error.__cause__ = error
            self._failures += 1
            if self._failures <= self.tolerate:
                log.warning("training goes on: %s", self._error)
        except BaseException as error:
            self._error, self._failures = error, self._failures + 1
