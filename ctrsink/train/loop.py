"""The training loop: stages, steps, checkpoints, evaluation; the same on one process and on many Ray workers."""

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from ctrsink import storage
from ctrsink.batch import Batch
from ctrsink.config import RunSpec
from ctrsink.data.cache import Cache
from ctrsink.data.dataset import Dataset
from ctrsink.data.examples import Layout
from ctrsink.data.manifest import Manifest
from ctrsink.data.order import mix64
from ctrsink.data.stream import SequenceSource, Step, TrainStream
from ctrsink.dist import Topology, all_max, all_sum, barrier, gather_rows
from ctrsink.errors import InputError
from ctrsink.evaluate.evaluator import evaluate_splits
from ctrsink.model.build import build_model, load_parameters
from ctrsink.train.checkpoint import Checkpoint, find_checkpoint, latest_checkpoint, require_data, save_checkpoint
from ctrsink.train.engine import Engine, EngineState
from ctrsink.train.rundir import DATA_NAME, identities, write_result
from ctrsink.train.stages import StageWindow, plan
from ctrsink.train.telemetry import Pace, Telemetry, progress_line

log = logging.getLogger("ctrsink.train")


@dataclass
class Progress:
    """Where the run is, and what earlier stages left behind."""

    step: int = 0
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    """Values of everything trained so far, as of the last rebuild of the engine."""
    state: EngineState | None = None


class Trainer:
    """Trains the run that `spec.run_dir` was claimed for, from its latest checkpoint on if it has one.

    Args:
        spec: the run.
        topology: this process among the workers.
        vocabulary: size of the data set's tokenizer.

    Raises:
        InputError: the data set cannot be read, or was changed since the run was claimed.
    """

    def __init__(self, spec: RunSpec, topology: Topology, vocabulary: int) -> None:
        self.spec, self.topology, self.vocabulary = spec, topology, vocabulary
        self.dataset = Dataset(spec.data.uri, 2 * spec.data.shuffle_shards, Cache.of(spec.data.cache))
        require_same_data(spec, self.dataset.manifest, topology)
        self.layout = Layout.of(spec.data, spec.model.sinks)
        source = SequenceSource(self.dataset, "train", self.layout)
        self.stream = TrainStream(
            source,
            spec.seed,
            spec.data.shuffle_shards,
            spec.train.batch_size,
            spec.accumulation,
            topology.rank,
            topology.world,
            spec.data.order,
            spec.data.workers,
            spec.train.micro_batch_tokens,
        )
        self.windows = plan(spec, sum(source.per_shard))
        self.progress = Progress()
        self.impressions, self.seconds = 0, 0.0
        self.engine: Engine | None = None
        self.telemetry: Telemetry | None = None

    @property
    def total_steps(self) -> int:
        return self.windows[-1].end

    def run(self, stop_after: int | None = None) -> dict[str, Any]:
        """Train to the end, or for `stop_after` optimiser steps; evaluates once the last stage is done.

        Returns:
            `steps` of the run so far, whether it is `finished`, `impressions` trained on and `seconds` of training so
            far, and `evaluation` by split; also in the run's result.json.
        """
        self._restore()
        stop = self.total_steps if stop_after is None else min(self.total_steps, self.progress.step + stop_after)
        if self.topology.is_first:
            self.telemetry = Telemetry(self.spec.run_dir, self.progress.step)
        with closing(iter(self.stream)) as steps:
            for window in self.windows:
                if self.progress.step < min(window.end, stop):
                    self._run_stage(window, min(window.end, stop), steps)
        finished = self.progress.step == self.total_steps
        evaluation = self._evaluate() if finished else {}
        result = {
            "steps": self.progress.step,
            "finished": finished,
            "impressions": self.impressions,
            "seconds": self.seconds,
            "evaluation": evaluation,
        }
        if self.telemetry is not None:
            self.telemetry.close()
            write_result(self.spec.run_dir, result)
        barrier(self.topology)
        return result

    def _restore(self) -> None:
        """Take up the latest checkpoint, the one that the first rank sees: all ranks go on from the same step or none does."""
        run_dir = self.spec.run_dir
        checkpoint = latest_checkpoint(run_dir) if self.topology.is_first else None
        step = int(all_sum([checkpoint.step if checkpoint else 0], self.topology)[0])
        if step == 0:
            return
        checkpoint = checkpoint or find_checkpoint(run_dir, step)
        require_data(self.spec.run_dir, checkpoint, identities(self.spec, self.dataset.manifest), self.spec.data.uri)
        log.info("continuing from the checkpoint of step %d", checkpoint.step)
        self.progress = Progress(
            checkpoint.step,
            checkpoint.parameters,
            EngineState({}, checkpoint.moments, checkpoint.steps),
        )
        self.stream.load_state_dict({"position": checkpoint.position})
        self.impressions, self.seconds = checkpoint.impressions, checkpoint.seconds

    def _run_stage(self, window: StageWindow, stop: int, steps: Iterator[Step]) -> None:
        engine = self._engine_for(window)
        progress, train = self.progress, self.spec.train
        pace = Pace()
        waiting = time.monotonic()
        for step in islice(steps, stop - progress.step):
            waited = time.monotonic() - waiting
            seed_step(self.spec.seed, progress.step, self.topology.rank)
            result = engine.step(self._evened(step), step.impressions, window.spec, window.factor(progress.step))
            progress.step += 1
            self.impressions += step.impressions
            self.seconds += time.monotonic() - waiting
            pace.count(step.impressions, sum(b.tokens for b in step.micro_batches), waited)
            if progress.step % train.log_every == 0 or progress.step in (1, stop):
                self._report(
                    window, {"loss": result.loss, "grad_norm": result.grad_norm, **pace.report(self.total_steps - progress.step)}
                )
            if progress.step % train.checkpoint_every == 0 or progress.step == stop:
                self._checkpoint(engine)
            waiting = time.monotonic()

    def _evened(self, step: Step) -> list[Batch]:
        """The step's micro-batches, as many as the rank with most of them has."""
        if step.filler is None:
            return step.micro_batches
        missing = all_max(len(step.micro_batches), self.topology) - len(step.micro_batches)
        return [*step.micro_batches, *[step.filler] * missing]

    def _engine_for(self, window: StageWindow) -> Engine:
        """The engine of this stage; a new one, on a model built anew, where what is trained changes.

        Building the model anew costs a load from disk and is right under every ZeRO stage: ZeRO-3 leaves no whole model behind.
        """
        if self.engine is not None and self.engine.trainable == window.spec.trainable:
            return self.engine
        if self.engine is not None:
            state = self.engine.state()
            self.progress.parameters |= state.parameters
            self.progress.state = state
            self.engine.destroy()
        model = build_model(self.spec.model, self.vocabulary, self.spec.seed, self.spec.train.precision)
        load_parameters(model, self.progress.parameters)
        model.to(self.topology.device).train()
        self.engine = Engine(model, self.spec, window.spec, self.topology, self.progress.state)
        return self.engine

    def _report(self, window: StageWindow, row: dict[str, Any]) -> None:
        tokens = all_sum([row["tokens_per_s"]], self.topology)[0]
        row = {
            "step": self.progress.step,
            "stage": window.spec.name,
            "position": self.stream.position,
            **row,
            "tokens_per_s": tokens,
        }
        row |= {f"lr/{group}": window.spec.lr[group] * window.factor(self.progress.step - 1) for group in window.spec.trainable}
        if self.telemetry is not None:
            self.telemetry.add(row)
            log.info(progress_line(row, self.total_steps), extra={"fields": row})

    def _checkpoint(self, engine: Engine) -> None:
        state = engine.state()
        if self.telemetry is not None:
            parameters = self.progress.parameters | state.parameters
            checkpoint = Checkpoint(
                step=self.progress.step,
                position=self.stream.position,
                parameters=parameters,
                moments=state.moments,
                steps=state.steps,
                dataset=self.dataset.manifest.identity,
                impressions=self.impressions,
                seconds=self.seconds,
            )
            # The metrics first: a resumed run drops rows behind its checkpoint, but could not make missing ones again.
            self.telemetry.flush()
            log.info("checkpoint %s", save_checkpoint(self.spec.run_dir, checkpoint))
        barrier(self.topology)

    def _evaluate(self) -> dict[str, dict[str, float]]:
        engine = self._engine_for(self.windows[-1])
        readout = self.windows[-1].spec.readout
        engine.engine.eval()
        spec = self.spec
        forward = lambda batch: engine.forward(batch, readout)[1]  # noqa: E731
        return evaluate_splits(forward, self.dataset, self.layout, spec.evaluate, spec.run_dir, self.progress.step, self.topology)


def require_same_data(spec: RunSpec, manifest: Manifest, topology: Topology) -> None:
    """Refuse to begin where ranks read different data sets, or another than the run was claimed for; all ranks raise, or none.

    Raises:
        InputError: somebody appended to the data set, or replaced it, in between.
    """
    found = [manifest.identity]
    claim = storage.join(spec.run_dir, DATA_NAME)
    if topology.is_first and storage.exists(claim):
        claimed = storage.read_bytes(claim).decode()
        if claimed not in identities(spec, manifest):
            found.append(claimed)
    # Words of a hash go through fp64 unharmed.
    words = [np.frombuffer(hashlib.sha256(identity.encode()).digest(), np.uint32) for identity in found]
    rows = gather_rows(np.array(words, np.float64), topology)
    if (rows != rows[0]).any():
        raise InputError(f"the data set {spec.data.uri} was changed while the run was starting: start it again")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step: no generator state has to be saved, and any step can be repeated."""
    key = int(mix64(torch.tensor([step]).numpy(), seed, rank)[0] >> 1)
    torch.manual_seed(key)
