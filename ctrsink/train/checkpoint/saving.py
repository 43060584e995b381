"""How a checkpoint leaves the loop: by the first rank, in the background, or by all ranks together where each has a part."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from ctrsink.config import RunSpec
from ctrsink.dist import Topology
from ctrsink.errors import InputError, RunError
from ctrsink.estimate.host import AT_ONCE
from ctrsink.train.checkpoint.checkpoint import FILES, Checkpoint
from ctrsink.train.checkpoint.native import save_native
from ctrsink.train.checkpoint.retention import Keeper
from ctrsink.train.checkpoint.shared import save_shared, write_tables
from ctrsink.train.checkpoint.writer import TOLERATED, CheckpointWriter
from ctrsink.train.engine import Engine, EngineState
from ctrsink.train.tensors import Tensors, in_memory

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
        self._failures = 0  # saves by all ranks, in a row
        self._unsaved: Checkpoint | None = None  # the last of these, if it is not in the storage

    def save(self, engine: Engine, make: Callable[[EngineState], Checkpoint], metrics: "Future[None] | None") -> None:
        """Collective. Training is blocked while the state is gathered, and while the save before is still going on.

        Shards of DeepSpeed and of tables are written meanwhile, too, and what is large under ZeRO-3, tensor by tensor: a copy of
        it to write later may not fit into memory.

        Args:
            make: the checkpoint of an engine's state.
            metrics: of the first rank; the checkpoint is written when they are. A resumed run drops rows behind its checkpoint,
                but could not make missing ones again.

        Raises:
            RunError, InputError: the checkpoint, or too many before it, could not be written.
        """
        began = time.monotonic()
        checkpoint = make(self._state(engine))
        if isinstance(checkpoint.parameters, Tensors) and not self._native(engine) and checkpoint_bytes(checkpoint) <= AT_ONCE:
            parameters, moments = (in_memory(of, self._topology.is_first) for of in (checkpoint.parameters, checkpoint.moments))
            checkpoint = replace(checkpoint, parameters=parameters, moments=moments)
        if self._native(engine) or engine.tables.all or isinstance(checkpoint.parameters, Tensors):
            self._save_by_all(engine, checkpoint, metrics)
        else:
            self._failures, self._unsaved = 0, None  # this one stands in the place of any that failed before
            if self._writer is not None:
                self._writer.save(checkpoint, metrics.result if metrics is not None else None)
        self._blocked = time.monotonic() - began

    def finish(self, engine: Engine | None) -> None:
        """Collective: return when the last checkpoint is in the storage; one that failed is tried once more.

        Args:
            engine: not stepped since that checkpoint.

        Raises:
            RunError, InputError: it cannot be saved.
        """
        if engine is not None and self._unsaved is not None:
            self._failures = TOLERATED
            self._save_by_all(engine, self._unsaved, None)
        self.wait()

    def wait(self) -> None:
        """Return when what is saved in the background is in the storage.

        Raises:
            RunError, InputError: it cannot be saved.
        """
        if self._writer is not None:
            self._writer.wait()

    def seconds(self) -> dict[str, float]:
        """How long the last checkpoint blocked training, and how long the last finished background save took."""
        found = {"checkpoint_s": self._blocked, "save_s": self._writer.seconds if self._writer is not None else None}
        return {key: value for key, value in found.items() if value is not None}

    def _state(self, engine: Engine) -> EngineState:
        if self._native(engine):
            return EngineState({}, {}, engine.steps())
        return engine.given_state() if engine.zero_stage == 3 else engine.state(self._topology.is_first)

    def _native(self, engine: Engine) -> bool:
        return self._spec.train.checkpoint_format == "native" and bool(set(engine.trainable) & set(engine.model.large))

    def _save_by_all(self, engine: Engine, checkpoint: Checkpoint, metrics: "Future[None] | None") -> None:
        def before() -> None:
            if metrics is not None:
                metrics.result()
            self.wait()  # one hand at a time in the folder

        run_dir, topology = self._spec.run_dir, self._topology
        try:
            if self._native(engine):
                save_native(engine, run_dir, checkpoint, before)
            else:
                write = lambda folder: write_tables(engine.tables.all, folder)  # noqa: E731
                save_shared(run_dir, checkpoint, FILES, write, topology, before)
            self._failures, self._unsaved = 0, None
        except (InputError, RunError) as error:  # on every rank alike
            self._failures, self._unsaved = self._failures + 1, checkpoint
            if self._failures > TOLERATED:
                raise
            if topology.is_first:
                log.warning("the checkpoint of step %d was not saved, training goes on: %s", checkpoint.step, error)
            return
        if topology.is_first:
            self._keeper.apply(checkpoint.step)


def checkpoint_bytes(checkpoint: Checkpoint) -> int:
    """Of its parameters and moments; the same on all ranks."""
    return sum(of.bytes for of in (checkpoint.parameters, checkpoint.moments) if isinstance(of, Tensors))
