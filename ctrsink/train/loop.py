"""The training loop: stages, steps, validation, checkpoints, evaluation; the same on one process and on many Ray workers."""

import gc
import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ctrsink.config import RunSpec
from ctrsink.config.stages import StageSpec
from ctrsink.dataset.reader import Dataset
from ctrsink.dist import Topology, all_max, all_sum, barrier
from ctrsink.errors import Diverged, InputError
from ctrsink.evaluate.evaluator import evaluate_splits, measure, validation_sample
from ctrsink.evaluate.tallies import measured
from ctrsink.families.facts import Facts
from ctrsink.families.protocol import Out
from ctrsink.families.registry import family_of, source_of
from ctrsink.features.mix64 import mix64
from ctrsink.run.folder import identities, write_result
from ctrsink.sequences.batch import Batch
from ctrsink.stream.evaluation import Share
from ctrsink.stream.stream import Step, TrainStream
from ctrsink.train.built import built
from ctrsink.train.checkpoint.checkpoint import Checkpoint, require_data
from ctrsink.train.checkpoint.native import Shards, load_native, restore
from ctrsink.train.checkpoint.saving import Saver
from ctrsink.train.engine import Engine, EngineState
from ctrsink.train.failures import Finite, located
from ctrsink.train.host_hooks import ALONE, HostHooks
from ctrsink.train.host_memory import give_back
from ctrsink.train.observe.advice import advice
from ctrsink.train.observe.audit import Audit
from ctrsink.train.observe.hardware import over_ranks, peak_of, precision_of
from ctrsink.train.observe.probe import probe_batch
from ctrsink.train.observe.telemetry import Pace, Telemetry, progress_line
from ctrsink.train.progress import Progress
from ctrsink.train.same_data import require_same_data
from ctrsink.train.stages import StageController
from ctrsink.train.streams import stream_of
from ctrsink.train.tensors import joined

log = logging.getLogger("ctrsink.train")
LOOK_EVERY_S = 5.0  # for the announced loss of a node


class Trainer:
    """Trains the run that `spec.run_dir` was claimed for, from its latest checkpoint on if it has one.

    Args:
        spec: the run.
        topology: this process among the workers.
        facts: sizes that the data set has, as the family's check found them.
        hooks: what the place where this process runs has to tell it.

    Raises:
        InputError: the data set cannot be read, or was changed since the run was claimed.
    """

    def __init__(self, spec: RunSpec, topology: Topology, facts: Facts, hooks: HostHooks = ALONE) -> None:
        torch.backends.cuda.matmul.allow_tf32 = spec.train.tf32
        self.spec, self.topology, self.facts, self.hooks = spec, topology, facts, hooks
        self.family = family_of(spec.model.family)
        self.dataset = Dataset.of(spec.data)
        require_same_data(spec, self.dataset.manifest, topology)
        self.layout = self.family.layout(spec.data, spec.model, self.dataset.manifest)
        self.source = source_of(self.dataset, "train", self.layout)
        self.controller = StageController(spec, sum(self.source.per_shard))
        self.progress = Progress()
        self.audit = Audit()  # of this rank, since this process began
        self.finite = Finite(spec.train)
        self.saver = Saver(spec, topology)
        self.shards: Shards | None = None
        self.engine: Engine | None = None
        self.telemetry: Telemetry | None = None
        self.peak_tflops = peak_of(topology.device, spec.runtime.peak_tflops)
        self.probed: Batch | None = None
        self.sample: Share | None = None
        self._looked = time.monotonic()
        self._announced: str | None = None

    def run(self, stop_after: int | None = None) -> dict[str, Any]:
        """Train to the end, or for `stop_after` optimiser steps; evaluates once the last stage is done.

        Returns:
            `steps` of the run so far, whether it is `finished`, why it was `stopped` before (None: it was not asked to),
            `impressions` trained on, their `checksum`, how many were `skipped` and the `flops` of all (see Audit), `seconds` of
            training so far, and `evaluation` by split; also in the run's result.json.

        Raises:
            RunError: a step failed; the message names rank, step, stage and shards.
        """
        self._restore()
        self.progress.precision = precision_of(self.spec.train.precision, self.progress.precision, self.topology)
        stop_at = None if stop_after is None else self.controller.step + stop_after
        if self.topology.is_first:
            self.telemetry = Telemetry(self.spec, self.controller.step, self.hooks.gauges)
            for line in (
                advice(self.spec, sum(self.source.per_shard), self.controller.last_step) if not self.controller.step else ()
            ):
                log.warning("%s", line)
        try:
            stopped = self._run_stages(stop_at)
            finished = self.controller.finished and stopped is None
            with self._during("evaluation"):
                evaluation = self.evaluate() if finished else {}
            trained = self._trained()
        except BaseException:
            with suppress(Exception):  # what went wrong first is told
                self.saver.wait()
            with suppress(Exception):
                if self.telemetry is not None:
                    self.telemetry.close(False)
            raise
        result = {
            "steps": self.controller.step,
            "finished": finished,
            "stopped": stopped,
            "impressions": trained.impressions,
            "checksum": f"{trained.checksum:016x}",
            "skipped": trained.skipped,
            "seconds": self.progress.seconds,
            "flops": trained.flops,
            "evaluation": evaluation,
        }
        if self.telemetry is not None:
            self.telemetry.close(finished)
            write_result(self.spec.run_dir, result)
        barrier(self.topology)
        return result

    def _restore(self) -> None:
        """Take up the latest checkpoint, the one that the first rank sees: all ranks go on from the same step or none does."""
        found = restore(self.spec.run_dir, self.spec.train.zero_stage, self.topology)
        if found is None:
            return
        checkpoint, self.shards = found
        self.take_up(checkpoint)
        log.info("continuing from the checkpoint of step %d with %d workers", checkpoint.step, self.topology.world)

    def take_up(self, checkpoint: Checkpoint) -> None:
        """Go on from there."""
        if not checkpoint.controller:
            raise InputError(f"{self.spec.run_dir} was begun by an older version of ctrsink: finish it with that one")
        require_data(self.spec.run_dir, checkpoint, identities(self.spec, self.dataset.manifest), self.spec.data.uri)
        self.controller.load_state_dict(checkpoint.controller)
        self.progress = Progress.of(checkpoint.under_present_names(self.family.earlier_names))

    def _run_stages(self, stop_at: int | None) -> str | None:
        """Train to the end or to step `stop_at`, and see the last checkpoint saved; returns why the run was asked to stop."""
        stopped = None
        while stopped is None and not self.controller.finished and self.controller.step != stop_at:
            self.controller.advance()
            stopped = self._run_stage(stop_at)
        with self._during("checkpoint"):
            self.saver.finish(self.engine)
        return stopped

    def _run_stage(self, stop_at: int | None) -> str | None:
        """Train until the stage has ended or step `stop_at` is reached; returns why the run was asked to stop, if it was."""
        stage, controller, train = self.controller.stage, self.controller, self.spec.train
        with self._during("start of the stage"):
            engine = self._engine_for(stage)
            stream = self._stream_for(stage, engine)
        pace = Pace(engine.model.flop_count(stage.learns))
        with closing(iter(stream)) as steps:
            while True:
                result, stopped, preempted = self._step(engine, stream, steps, stage, pace)
                last = controller.ended or controller.step == stop_at or stopped is not None
                with self._during("validation"):
                    metrics = self._validate(engine, stage)
                if metrics or last or controller.step % train.log_every == 0 or controller.step == 1:
                    with self._during("report"):
                        inside = self._look_inside(engine, stage) if metrics else {}
                        self._report(stage, result | metrics | inside, pace)
                better = f"valid/{train.keep.best}" in metrics
                if last or controller.ended or preempted or better or controller.step % train.checkpoint_every == 0:
                    with self._during("checkpoint"):
                        self._checkpoint(engine, metrics)
                if last or controller.ended:
                    return stopped

    def _step(
        self, engine: Engine, stream: TrainStream, steps: Iterator[Step], stage: StageSpec, pace: Pace
    ) -> tuple[dict[str, float], str | None, bool]:
        """One optimiser step: what is to be reported, why the run is to stop, whether the loss of a node was announced."""
        controller, progress = self.controller, self.progress
        position = stream.position

        def where() -> str:
            return f"{self._where(1)}, {', '.join(stream.shards_of(position))}"

        began = time.monotonic()
        self._doing(lambda: f"the data of {', '.join(stream.shards_of(position))}")
        with located(where):
            step = next(steps)
            waited = time.monotonic() - began
            seed_step(self.spec.seed, controller.step, self.topology.rank)
            reason = self.hooks.stop()
            look = self.topology.is_first and began - self._looked > LOOK_EVERY_S
            factor = controller.factor()
            self._doing(lambda: "the computation of a step, on this rank or on another that it waits for")
            micro_batches, units = self._drawn(engine, self._evened(step), stage, step.impressions)
            result = engine.step(micro_batches, units, stage, factor, (reason is not None, look))
        if (skipped := self.finite.skips(result, where)) is not None:
            log.warning("%s", skipped)
            self.audit += Audit(skipped=sum(batch.impressions for batch in step.micro_batches))
        else:
            self.audit += Audit.of(step.micro_batches)
        stop, looks = result.votes
        if looks:
            self._looked = time.monotonic()
        preempted = self._preempted() if looks else False
        controller.after_step()
        progress.position = stream.position
        progress.seconds += time.monotonic() - began
        self.audit += Audit(flops=pace.count(step.impressions, micro_batches[: len(step.micro_batches)], waited))
        rates = {f"lr/{group}": stage.lr[group] * factor for group in stage.trainable}
        row = {"loss": result.loss, "grad_norm": result.grad_norm, **rates}
        return row, (reason or "another rank was asked to stop") if stop else None, preempted

    def _preempted(self) -> bool:
        """Whether the loss of a node was announced since the last look; the same one is told until the node goes."""
        announced = self.hooks.preemption()
        if announced in (None, self._announced):
            return False
        self._announced = announced
        log.warning("%s: a checkpoint is made", announced)
        return True

    def _where(self, ahead: int = 0) -> str:
        return f"rank {self.topology.rank}, step {self.controller.step + ahead}, stage {self.controller.stage.name}"

    def _doing(self, what: Callable[[], str]) -> None:
        self.hooks.doing(self.controller.step, lambda: f"{what()} ({self._where()})")

    def _during(self, what: str) -> AbstractContextManager[None]:
        """Failures between two steps are told with what was done."""
        self._doing(lambda: f"the {what}")
        return located(lambda: f"{self._where()}, {what}")

    def _evened(self, step: Step) -> list[Batch]:
        """The step's micro-batches, as many as the rank with most of them has."""
        if step.filler is None:
            return step.micro_batches
        missing = all_max(len(step.micro_batches), self.topology) - len(step.micro_batches)
        return [*step.micro_batches, *[step.filler] * missing]

    def _drawn(self, engine: Engine, batches: list[Batch], stage: StageSpec, impressions: int) -> tuple[list[Batch], int]:
        """The batches with what the objective draws at random, and what its loss is a mean over in the global batch."""
        key = int(mix64(np.array([self.controller.step]), self.spec.seed)[0] >> 1)
        drawn = [engine.model.drawn(batch, stage.learns, key) for batch in batches]
        if stage.objective == "click":  # known to every rank by the order of the sequences
            return drawn, impressions
        return drawn, max(1, int(all_sum([sum(batch.units or 0 for batch in drawn)], self.topology)[0]))

    def _engine_for(self, stage: StageSpec) -> Engine:
        """The engine of this stage; a new one, on a model built anew, where what is trained changes.

        Building the model anew costs a load from disk and is right under every ZeRO stage: ZeRO-3 leaves no whole model behind.
        """
        if self.engine is not None and self.engine.trainable == stage.trainable:
            return self.engine
        if self.engine is not None:
            state = self.engine.handed_on(stage.trainable)
            self.progress.parameters = joined(self.progress.parameters, state.parameters)
            self.progress.state = state
            self.progress.tables = self.engine.tables.held()
            self.engine.destroy()
            self.engine = None  # or two models would be held at a time
            gc.collect()
        progress = self.progress
        model = built(self.spec, stage, self.facts, self.topology, progress.precision, progress.parameters)
        self.engine = Engine(model, self.spec, stage, self.topology, progress.state, progress.tables, progress.parameters)
        progress.parameters = self.engine.left_alone(progress.parameters)
        progress.state = progress.tables = None
        if self.shards is not None:
            load_native(self.engine, self.shards)
            self.shards = None
        return self.engine

    def _stream_for(self, stage: StageSpec, engine: Engine) -> TrainStream:
        """The stream of this stage, which goes on where the one before ended."""
        stream = stream_of(self.spec, stage, engine, self.source, self.facts, self.progress.precision)
        stream.load_state_dict({"position": self.progress.position})
        return stream

    def _validate(self, engine: Engine, stage: StageSpec) -> dict[str, float]:
        """Metrics on the validation sample as `valid/<metric>`, when it is time for them; the controller is told."""
        validation, controller = self.spec.train.validation, self.controller
        if validation is None or not (controller.ended or controller.step % validation.every == 0):
            return {}
        if self.sample is None:
            size = self.spec.evaluate.batch_size
            self.sample = validation_sample(self.dataset, "valid", self.layout, validation.sequences, size, self.topology)
        forward, topology = _forward(engine, stage), self.topology
        with _evaluating(engine):
            clicks = stage.objective == "click"
            found = measure(forward, self.sample, "valid", topology) if clicks else measured(forward, self.sample, topology)
        controller.observe(found)
        return {f"valid/{name}": value for name, value in found.items()}

    def _look_inside(self, engine: Engine, stage: StageSpec) -> dict[str, float]:
        """What the model shows of its inside, always in the same few sequences of the valid split."""
        if self.probed is None:
            self.probed = probe_batch(self.dataset.reader(), "valid", self.layout).to(self.topology.device)
        with _evaluating(engine):
            return engine.model.look(self.probed, stage.learns, engine.forward)

    def _report(self, stage: StageSpec, row: dict[str, float], pace: Pace) -> None:
        last = self.controller.last_step
        rates = pace.report(None if last is None else last - self.controller.step)
        rates = over_ranks(rates, self.peak_tflops, self.topology)
        give_back()
        whole = {"step": self.controller.step, "stage": stage.name, "position": self.progress.position}
        whole |= {**row, **rates, **self.saver.seconds()}
        if self.telemetry is not None:
            self.telemetry.add(whole)
            # A row with a validation stays on the terminal, others follow one another in one place.
            share = 1.0 if last is None or "valid/auc" in row else self.controller.step / last
            log.info(progress_line(whole, last), extra={"fields": whole, "progress": ("train", share)})

    def _trained(self) -> Audit:
        """What all ranks have trained on since the run began."""
        return self.progress.trained + self.audit.over_ranks(self.topology)

    def _checkpoint(self, engine: Engine, metrics: dict[str, float]) -> None:
        if not engine.is_finite():  # it would take the place of a good one, and nothing could go on from it
            raise Diverged("the weights are not finite after this step: lower the learning rates, or look at the data")
        trained = self._trained()

        def make(state: EngineState) -> Checkpoint:
            return Checkpoint(
                step=self.controller.step,
                position=self.progress.position,
                parameters=joined(self.progress.parameters, state.parameters),
                moments=state.moments,
                steps=state.steps,
                dataset=self.dataset.manifest.identity,
                controller=self.controller.state_dict(),
                metrics={name.removeprefix("valid/"): value for name, value in metrics.items()},
                trained=asdict(trained),
                seconds=self.progress.seconds,
                precision=self.progress.precision,
            )

        self.saver.save(engine, make, self.telemetry.flush() if self.telemetry is not None else None)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Measure the model as it is now, and write what was found into the run's folder."""
        stage, spec = self.controller.stage, self.spec
        engine = self._engine_for(stage)
        with _evaluating(engine):
            return evaluate_splits(
                _forward(engine, stage),
                self.dataset,
                self.layout,
                spec.evaluate,
                spec.run_dir,
                self.controller.step,
                self.topology,
            )


def _forward(engine: Engine, stage: StageSpec) -> Callable[[Batch], Out]:
    return lambda batch: engine.forward(engine.model.drawn(batch, stage.learns, 0), stage.learns)


@contextmanager
def _evaluating(engine: Engine) -> Generator[None, None, None]:
    """Without dropout; back to training afterwards."""
    engine.deepspeed.eval()
    try:
        yield
    finally:
        engine.deepspeed.train()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step: no generator state has to be saved, and any step can be repeated."""
    key = int(mix64(np.array([step]), seed, rank)[0] >> 1)
    torch.manual_seed(key)
