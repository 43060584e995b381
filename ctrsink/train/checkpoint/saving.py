"""How a checkpoint leaves the loop: portable ones by the first rank, in the background, native ones by all ranks together."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future

from ctrsink.config import RunSpec
from ctrsink.dist import Topology
from ctrsink.errors import InputError, RunError
from ctrsink.train.checkpoint.checkpoint import Checkpoint
from ctrsink.train.checkpoint.native import save_native
from ctrsink.train.checkpoint.retention import Keeper
from ctrsink.train.checkpoint.writer import TOLERATED, CheckpointWriter
from ctrsink.train.engine import Engine, EngineState

log = logging.getLogger("ctrsink.train")


class Saver:
    """Saves the checkpoints of a run.

    Args:
        spec: the run.
        topology: this rank; the first one writes.
    """

    def __init__(self, spec: RunSpec, topology: Topology) -> None:
        self._spec, self._topology = spec, topology
        self._writer = CheckpointWriter(spec.run_dir, spec.train.keep) if topology.is_first else None
        self._keeper = Keeper(spec.run_dir, spec.train.keep)
        self._blocked: float | None = None
        self._failures = 0  # native saves in a row

    def save(self, engine: Engine, make: Callable[[EngineState], Checkpoint], metrics: "Future[None] | None") -> None:
        """Collective. Training is blocked while the state is gathered, and while the save before is still going on.

        Args:
            make: the checkpoint of an engine's state.
            metrics: of the first rank; the checkpoint is written when they are. A resumed run drops rows behind its checkpoint,
                but could not make missing ones again.

        Raises:
            RunError, InputError: the checkpoint, or too many before it, could not be written.
        """
        began = time.monotonic()
        if self._spec.train.checkpoint_format == "native" and set(engine.trainable) & set(engine.model.large):
            self._save_native(engine, make(EngineState({}, {}, engine.steps())), metrics)
        else:
            state = engine.state(self._topology.is_first)
            if self._writer is not None:
                self._writer.save(make(state), metrics.result if metrics is not None else None)
        self._blocked = time.monotonic() - began

    def _save_native(self, engine: Engine, checkpoint: Checkpoint, metrics: "Future[None] | None") -> None:
        def before() -> None:
            if metrics is not None:
                metrics.result()
            if self._writer is not None:
                self._writer.wait()  # one hand at a time in the folder

        try:
            save_native(engine, self._spec.run_dir, checkpoint, before)
            self._failures = 0
        except (InputError, RunError) as error:  # on every rank alike
            self._failures += 1
            if self._failures > TOLERATED:
                raise
            if self._topology.is_first:
                log.warning("the checkpoint of step %d was not saved, training goes on: %s", checkpoint.step, error)
            return
        if self._topology.is_first:
            self._keeper.apply(checkpoint.step)

    def wait(self) -> None:
        """Return when the last checkpoint is in the storage.

        Raises:
            RunError, InputError: it cannot be saved.
        """
        if self._writer is not None:
            self._writer.wait()

    def seconds(self) -> dict[str, float]:
        """How long the last checkpoint blocked training, and how long the last finished background save took."""
        found = {"checkpoint_s": self._blocked, "save_s": self._writer.seconds if self._writer is not None else None}
        return {key: value for key, value in found.items() if value is not None}
