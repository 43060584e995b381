"""Sections of optimisation, evaluation and the place where a run happens."""

from typing import Any, Literal

from pydantic import Field, model_validator

from ctrsink.config.base import Section

Split = Literal["train", "valid", "test"]


class KeepSpec(Section):
    """Which checkpoints stay; the newest whole one always does. Unfinished ones older than it are removed where some are."""

    last: int | None = Field(default=None, ge=1)
    """The newest so many; null keeps all."""
    best: Literal["auc", "logloss", "gauc"] | None = None
    """The one with the best validation by this metric: largest AUC or GAUC, smallest logloss; `--checkpoint best` takes it."""


class TrainSpec(Section):
    """Optimiser, batch, DeepSpeed and checkpoints."""

    batch_size: int = Field(default=32, ge=1)
    """Sequences per optimiser step over all workers; it does not depend on the number of workers."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Sequences per forward pass of one worker; the accumulation follows from it."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per forward pass of one worker at most, in place of `micro_batch_size`: how many micro-batches a step has follows
    from its sequences. A longer sequence stands alone."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: what is split over the workers. 0: nothing, 1: optimiser state, 2: gradients too, 3: weights too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: frozen weights and matrix products in bfloat16, trainable parameters stay fp32."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decay of matrices; vectors and scalars never decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two moments."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; a longer one is scaled down."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Optimiser steps between checkpoints; a stage's end always makes one."""
    checkpoint_format: Literal["portable", "native"] = "portable"
    """`portable`: safetensors by parameter name, gathered by the first worker, written while training goes on. `native`: in
    stages that train the whole backbone each worker writes its own shards of the optimiser's state, and training waits: for full
    fine-tuning of models whose optimiser state does not fit one host's memory. Needs `zero_stage` 1 to 3."""
    keep: KeepSpec = KeepSpec()
    """Which checkpoints stay."""
    log_every: int = Field(default=10, ge=1)
    """Optimiser steps between progress lines and rows of metrics.jsonl."""

    @model_validator(mode="after")
    def _native_has_shards(self) -> "TrainSpec":
        if self.checkpoint_format == "native" and self.zero_stage == 0:
            raise ValueError(
                "checkpoint_format native needs shards, and zero_stage 0 has none; use portable, or zero_stage 1 to 3"
            )
        return self


class EvaluateSpec(Section):
    """What is measured when training ends, and by `ctrsink evaluate`."""

    splits: tuple[Split, ...] = ("valid", "test")
    """Splits of the data set, when training ends; `ctrsink evaluate --split` names its own."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per forward pass of one worker."""
    max_sequences: int | None = Field(default=None, ge=1)
    """Evaluate a fixed random sample of this many sequences of a split instead of all."""


class RuntimeSpec(Section):
    """Where the workers run. `runtime: local` and `runtime: ray` are short for `kind`."""

    kind: Literal["local", "ray"] = "local"
    """`local`: one process, no Ray. `ray`: Ray Train workers, on this machine or the cluster at `address`."""
    workers: int = Field(default=1, ge=1)
    """Processes that train; with `cuda` each has one GPU."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What the workers compute on."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """Cores, and so threads, of each worker."""
    address: str | None = None
    """Ray address; null starts a cluster in this process, or joins the one that a Ray job runs in."""
    start_timeout_s: float = Field(default=600, gt=0)
    """The workers must have been placed within this time."""
    collective_timeout_s: float = Field(default=600, gt=0)
    """A collective that hangs longer ends the run instead of blocking the machines."""
    max_failures: int = Field(default=0, ge=0)
    """Worker failures after which the group is started again from the last checkpoint."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _local_is_one(self) -> "RuntimeSpec":
        if self.kind == "local" and self.workers != 1:
            raise ValueError(f"local runs one process, got workers {self.workers}; for more set kind to ray")
        return self
