"""RunSpec: the whole configuration of one run, and the rules that span its sections."""

from pydantic import Field, model_validator

from ctrsink.config.base import Section
from ctrsink.config.data import DataSpec, PrepareSpec
from ctrsink.config.model import ModelSpec
from ctrsink.config.stages import StageSpec
from ctrsink.config.train import EvaluateSpec, RuntimeSpec, TrainSpec
from ctrsink.features.registry import signal as signal_of


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
        self._check_signals()
        self._check_bias()
        self._check_attention()
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

    def _check_signals(self) -> None:
        if self.data.text_history is not None and self.model.sinks is None:
            raise ValueError("data.text_history: behaviours without a text are their sinks alone, but model.sinks is null")
        if self.model.sinks is None or self.data.examples == "per_target":
            return
        if self.data.examples == "per_request":
            if "similarity" in self.model.sinks.signals:
                raise ValueError(
                    "model.sinks.signals: similarity depends on the target's item, which the history of per_request sequences is "
                    "shared by; use data.examples per_target, or another signal"
                )
            return
        for signal in self.model.sinks.signals:
            if signal_of(signal).depends_on_target:
                raise ValueError(
                    f"model.sinks.signals: {signal} depends on the target, which per_user sequences share a history of; "
                    "use previous_gap, feedback or another that does not, or data.examples per_target"
                )

    def _check_bias(self) -> None:
        if self.model.bias is not None and not self.model.bias.causal and self.data.examples == "per_user":
            raise ValueError("model.bias.causal: false shows a target later behaviours in per_user sequences; use per_target")

    def _check_attention(self) -> None:
        if self.model.attention == "flex" and self.runtime.device == "cpu":
            raise ValueError("model.attention: flex has no backward pass on a CPU; use blocks, or runtime.device cuda")

    def _check_stages(self) -> None:
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("stages: two stages have the same name")
        owners = {
            "sink": self.model.sinks,
            "bias": self.model.bias or self.model.temporal or self.model.similarity,
            "lora": self.model.lora,
            "ids": self.model.ids,
        }
        if self.model.ids and not any("ids" in stage.trainable for stage in self.stages):
            raise ValueError(f"stages: none trains the group ids, which the signal {self.model.ids[0]} has its embeddings in")
        for stage in self.stages:
            for group in stage.trainable:
                if group in owners and not owners[group]:
                    key = "sinks" if group == "sink" else group
                    why = "no signal is item_id or user_id" if group == "ids" else f"model.{key} is null"
                    raise ValueError(f"stages.{stage.name}: trainable {group} does not exist, because {why}")
            if stage.readout.over == "sinks" and self.model.sinks is None:
                raise ValueError(f"stages.{stage.name}: readout over sinks needs sinks, but model.sinks is null")
            if self.train.keep.best is not None and self.train.validation is None:
                raise ValueError("train.keep.best needs a validation sample: add train.validation, for example {every: 100}")
            if stage.plateau is not None and self.train.validation is None:
                raise ValueError(
                    f"stages.{stage.name}: plateau needs a validation sample: add train.validation, for example {{every: 100}}"
                )
            if self.model.lora is not None and "backbone" in stage.trainable and "lora" in stage.trainable:
                raise ValueError(f"stages.{stage.name}: lora and backbone together train the same weights twice; choose one")

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
