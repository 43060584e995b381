"""RunSpec: the whole configuration of one run, and the rules that span its sections."""

from pydantic import Field, model_validator

from ctrsink.config.base import Section
from ctrsink.config.data import DataSpec, PrepareSpec
from ctrsink.config.model import ModelSpec
from ctrsink.config.stages import StageSpec
from ctrsink.config.train import EvaluateSpec, RuntimeSpec, TrainSpec
from ctrsink.config.tree import shown
from ctrsink.errors import did_you_mean


class RunSpec(Section):
    """One run, from the raw log to the evaluated model."""

    name: str = "run"
    """Title of the model card and of the run in Ray."""
    run_dir: str
    """Folder of the run, local or s3://: configuration, metrics, checkpoints, evaluation."""
    seed: int = 0
    """Of the random weights, the order of the sequences and dropout."""
    prepare: PrepareSpec | None = None
    """Needed by `ctrsink data prepare` only."""
    data: DataSpec
    model: ModelSpec
    stages: tuple[StageSpec, ...] = Field(min_length=1)
    train: TrainSpec = TrainSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    runtime: RuntimeSpec = RuntimeSpec()

    def batch_size(self, stage: StageSpec) -> int:
        """Sequences per optimiser step of a stage, over all workers."""
        return stage.batch_size or self.train.batch_size

    def accumulation(self, stage: StageSpec, workers: int) -> int:
        """Micro-batches of one of `workers` per optimiser step, where `micro_batch_tokens` does not decide."""
        if self.train.micro_batch_tokens is not None:
            return 1
        return -(-self.batch_size(stage) // (workers * self.train.micro_batch_size))

    @model_validator(mode="after")
    def _consistent(self) -> "RunSpec":
        self._check_batch()
        self.model.check(self)
        self._check_stages()
        self._check_order()
        return self

    def _check_batch(self) -> None:
        workers = self.runtime.most_workers
        for stage in self.stages:
            if self.batch_size(stage) < workers:
                raise ValueError(
                    f"stages.{stage.name}: a batch of {self.batch_size(stage)} sequences leaves some of {workers} workers "
                    "without work: take a larger batch_size or fewer runtime.workers"
                )
        if self.data.examples == "per_request" and self.train.micro_batch_tokens is None:
            raise ValueError(
                "data.examples per_request: a piece of `targets` impressions is as many sequences as they were requests; "
                "bound the memory of a micro-batch with train.micro_batch_tokens, for example 8192 or auto"
            )

    def _check_stages(self) -> None:
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("stages: two stages have the same name")
        model = self.model
        for stage in self.stages:
            for group in (*stage.trainable, *stage.lr):
                if group not in model.GROUPS:
                    near = did_you_mean(group, model.GROUPS)
                    allowed = ", ".join(model.GROUPS)
                    raise ValueError(f"stages.{stage.name}: {shown(group)} is no group of the model{near} (allowed: {allowed})")
            for group in stage.trainable:
                if group not in stage.lr:
                    raise ValueError(f"stages.{stage.name}: no learning rate for the trainable group {group}: add lr.{group}")
                if group in model.absent:
                    raise ValueError(f"stages.{stage.name}: trainable {group} does not exist, because {model.absent[group]}")
            if stage.objective not in model.OBJECTIVES:
                allowed = ", ".join(model.OBJECTIVES)
                raise ValueError(f"stages.{stage.name}: objective {stage.objective} is not of this family (allowed: {allowed})")
            if self.train.keep.best is not None and self.train.validation is None:
                raise ValueError("train.keep.best needs a validation sample: add train.validation, for example {every: 100}")
            if stage.plateau is not None and self.train.validation is None:
                raise ValueError(
                    f"stages.{stage.name}: plateau needs a validation sample: add train.validation, for example {{every: 100}}"
                )
        if model.ids and not any("ids" in stage.trainable for stage in self.stages):
            raise ValueError(f"stages: none trains the group ids, which the signal {model.ids[0]} has its embeddings in")
        if self.stages[-1].objective != "click":
            raise ValueError(
                f"stages.{self.stages[-1].name}: the last stage's objective must be click: a run ends with predictions"
            )

    def _check_order(self) -> None:
        """In chronological order the data may grow: what depends on their size would change for steps that were taken already."""
        if self.data.order == "shuffled":
            return
        *earlier, last = self.stages
        for stage in earlier:
            if stage.steps is None or stage.epochs is not None or stage.plateau is not None:
                raise ValueError(f"stages.{stage.name}: data.order chronological needs steps for every stage but the last")
        if last.epochs != 1 or last.steps is not None or last.plateau is not None:
            raise ValueError(f"stages.{last.name}: the last stage in data.order chronological has epochs: 1, the single pass")
        if last.schedule.kind != "constant" or last.schedule.warmup:
            raise ValueError(
                f"stages.{last.name}: in data.order chronological the last stage grows with the data: its schedule must be "
                "{kind: constant, warmup: 0}; warm up in a stage before it"
            )
