"""Sections of optimisation, evaluation and the place where a run happens."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from ctrsink.config.base import MOST_SEQUENCES, Section

Split = Literal["train", "valid", "test"]


class MlflowSpec(Section):
    """Metrics to MLflow as well; needs `pip install 'ctrsink[mlflow]'`. Failures of it never end the training."""

    tracking_uri: str
    """Tracking server or database, such as `https://HOST` or `sqlite:////absolute/mlflow.db`. User and password come from the
    environment (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN)."""
    experiment: str = "ctrsink"
    """Experiment; made where it does not exist. The MLflow run has the run's `name`."""

    @field_validator("tracking_uri")
    @classmethod
    def _without_secret(cls, value: str) -> str:
        # The value is in none of these messages: it may hold what must not be shown.
        try:
            parts = urlsplit(value)
            secret = parts.password is not None or parts.query or (parts.username and parts.scheme in ("http", "https"))
        except ValueError:
            raise ValueError("this is no URI") from None
        if secret:
            raise ValueError(
                "credentials do not belong into a configuration: leave them and whatever follows a ? out, and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        if not parts.scheme:
            raise ValueError("give a URI such as https://HOST or sqlite:////absolute/mlflow.db")
        if parts.scheme == "sqlite" and not parts.path.startswith("//"):
            raise ValueError("a relative path means another file on every worker: write sqlite:////absolute/mlflow.db")
        return value


class ValidationSpec(Section):
    """A fixed random sample of the valid split, of 16 of its shards where these hold as many, measured while the run trains."""

    every: int = Field(default=200, ge=1)
    """Optimiser steps between two measurements; a stage's end always makes one."""
    sequences: int = Field(default=200, ge=1)
    """Size of the sample; each worker keeps its share in memory, about 30 bytes a token."""


class KeepSpec(Section):
    """Which checkpoints stay; the newest whole one always does. Unfinished ones older than it are removed where some are."""

    last: int | None = Field(default=None, ge=1)
    """The newest so many; null keeps all."""
    best: Literal["auc", "logloss", "gauc"] | None = None
    """The one with the best validation by this metric: largest AUC or GAUC, smallest logloss; `--checkpoint best` takes it."""


class TrainSpec(Section):
    """Optimiser, batch, DeepSpeed and checkpoints."""

    batch_size: int = Field(default=32, ge=1, le=MOST_SEQUENCES)
    """Sequences per optimiser step over all workers; it does not depend on the number of workers."""
    micro_batch_size: int = Field(default=8, ge=1)
    """Sequences per forward pass of one worker at most; the accumulation follows from it and from the number of workers."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Tokens per forward pass of one worker at most, in place of `micro_batch_size`: how many micro-batches a step has follows
    from its sequences. A longer sequence stands alone. `auto`: as many as fit into `memory_gib` by
    the estimate of `ctrsink plan`, when a stage begins."""
    memory_gib: float | None = Field(default=None, gt=0)
    """What `micro_batch_tokens: auto` may fill with activations; null: most of what a worker's device has free then."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: what is split over the workers. 0: nothing, 1: optimiser state, 2: gradients too, 3: weights too."""
    offload: bool = False
    """Optimiser state, and under ZeRO 3 the weights, lie in the host's memory, where the host steps them by torch's fused AdamW;
    needs `zero_stage` 1 to 3."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """`bf16`: frozen weights and matrix products in bfloat16, trainable parameters stay fp32. `auto`: bf16 where every worker's
    device has instructions for it, else fp32; a run keeps what it began in."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """What trained weights are held, and under ZeRO sent, in. `bf16`: where a stage trains a backbone in `precision: bf16`, Adam
    steps fp32 copies that are shared out over the workers, and checkpoints hold these; needs `zero_stage` 1 to 3."""
    tf32: bool = False
    """On CUDA, fp32 matrix products read ten bits of the mantissa instead of 23 (TensorFloat-32): several times faster on cards
    from Ampere on. What `precision: bf16` computes in bfloat16 does not change."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decay of matrices; vectors and scalars never decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's two moments."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient; a longer one is scaled down."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When the gradient of a step is NaN or infinite: end the run, or leave the step out, ten in a row at most."""
    validation: ValidationSpec | None = None
    """null: nothing is measured before the end."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Optimiser steps between checkpoints; a stage's end always makes one."""
    checkpoint_format: Literal["portable", "native"] = "portable"
    """`portable`: safetensors by parameter name, gathered by the first worker, written while training goes on. `native`: where a
    stage trains a whole language model, each worker writes its own shards of the optimiser's state, and training waits: for full
    fine-tuning of models whose optimiser state does not fit one host's memory. Needs `zero_stage` 1 to 3."""
    keep: KeepSpec = KeepSpec()
    """Which checkpoints stay."""
    log_every: int = Field(default=10, ge=1)
    """Optimiser steps between progress lines and rows of metrics.jsonl."""
    mlflow: MlflowSpec | None = None

    @model_validator(mode="after")
    def _offload_is_sharded(self) -> "TrainSpec":
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload needs zero_stage 1, 2 or 3: ZeRO 0 keeps everything on the device")
        return self

    @model_validator(mode="after")
    def _narrow_weights_have_masters(self) -> "TrainSpec":
        if self.weights == "bf16" and self.zero_stage == 0:
            raise ValueError("weights bf16 needs zero_stage 1, 2 or 3: ZeRO 0 has no fp32 copies, and bf16 rounds updates away")
        if self.weights == "bf16" and self.precision == "fp32":
            raise ValueError("weights bf16 needs precision bf16 or auto: fp32 multiplies in what it would have to widen again")
        return self

    @model_validator(mode="after")
    def _native_has_shards(self) -> "TrainSpec":
        if self.checkpoint_format == "native" and self.zero_stage == 0:
            raise ValueError(
                "checkpoint_format native needs shards, and zero_stage 0 has none; use portable, or zero_stage 1 to 3"
            )
        return self


class EvaluateSpec(Section):
    """What is measured when training ends, and by `ctrsink evaluate`; see docs/watching.md for more than 10^8 impressions."""

    splits: tuple[Split, ...] = ("valid", "test")
    """Splits of the data set, when training ends; `ctrsink evaluate --split` names its own."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per forward pass of one worker."""
    max_sequences: int | None = Field(default=None, ge=1)
    """Evaluate a fixed random sample of this many sequences of a split instead of all."""


class WorkersSpec(Section):
    """An elastic number of workers."""

    min: int = Field(default=1, ge=1)
    """With fewer the run waits."""
    max: int = Field(ge=1)
    """More are not used."""

    @model_validator(mode="after")
    def _ascending(self) -> "WorkersSpec":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class RuntimeSpec(Section):
    """Where the workers run. `runtime: local` and `runtime: ray` are short for `kind`."""

    kind: Literal["local", "ray"] = "local"
    """`local`: one process, no Ray. `ray`: Ray Train workers, on this machine or the cluster at `address`."""
    workers: Annotated[int, Field(ge=1)] | WorkersSpec = 1
    """Processes that train; with `cuda` each has one GPU. `{min: 1, max: 4}` is elastic: the run goes on with the workers that
    there is room for, and grows when there is more."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What the workers compute on."""
    cpus_per_worker: int = Field(default=1, ge=1, le=4096)
    """Cores, and so threads, of each worker."""
    address: str | None = None
    """Ray address; null starts a cluster in this process, or joins the one that a Ray job runs in."""
    start_timeout_s: float = Field(default=600, gt=0, le=10**8)
    """The workers must have been placed within this time, at the start and after a failure."""
    collective_timeout_s: float = Field(default=600, gt=0, le=10**8)
    """A collective that hangs longer ends the workers instead of blocking the machines: under gloo (`cpu`) it raises, under NCCL
    (`cuda`) a watchdog aborts the process. What each rank did last is left in the run's folder, and tells which was missing."""
    deterministic: bool = False
    """Torch takes only algorithms that give the same bits each time, slower ones, and an operation that has none ends the run. On
    a `cpu` with the same threads results repeat without it."""
    max_failures: int = Field(default=0, ge=-1)
    """Worker failures after which the group is started again from the last checkpoint; -1: any number."""
    max_preemptions: int = Field(default=-1, ge=-1)
    """Announced losses of a node that are survived in the same way, counted apart; -1: any number."""
    resize_every_s: float = Field(default=60, gt=0, le=10**8)
    """Elastic workers: time between two looks whether there is room for more."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """What one device could do at most, in TFLOP/s, to tell the share that training uses (`mfu`). null: known GPUs by their data
    sheet, in bf16; elsewhere there is no such share."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _local_is_one(self) -> "RuntimeSpec":
        if self.kind == "local" and self.workers != 1:
            raise ValueError(f"local runs one process, got workers {self.workers}; for more set kind to ray")
        return self

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers.max
