"""A training stage is data: what the prediction may read, what is trained, how fast and how long (CTR-Sink, arXiv 2508.03668)."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ctrsink.config.base import MOST_SEQUENCES, Section

_LARGEST_RATE = 1e37  # Adam's first step divides it by 1 - beta, and fp32 ends at 3.4e38
Group = str
"""A group of parameters, by the name that the family gives it."""


class ReadoutSpec(Section):
    """What the click head reads of the history."""

    over: Literal["sinks", "all"] = "all"
    """`sinks`: the target may use of its history the sinks only."""
    form: Literal["attend", "pool"] = "attend"
    """`attend`: an attention mask, read at the target's last token. `pool`: the mean of hidden states, as published."""

    @property
    def through_sinks(self) -> bool:
        """Whether the attention mask lets targets see other events through their sinks only."""
        return self.over == "sinks" and self.form == "attend"


class Objective(Section):
    """What a stage trains for: the loss, what it is counted in, and what a prediction may read."""

    kind: Literal["click", "cloze"] = "click"
    readout: ReadoutSpec = ReadoutSpec()


class ScheduleSpec(Section):
    """Learning rate over a stage, as a factor of each group's rate."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape between the warm-up and the end of the stage; `constant` ignores `final`."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the stage's steps that rise linearly from 0."""
    final: float = Field(default=0.1, ge=0, le=1)
    """Factor at the end of the stage."""


class PlateauSpec(Section):
    """No improvement of a metric on the validation sample (`train.validation`)."""

    metric: Literal["auc", "gauc", "logloss", "accuracy"] = "auc"
    """What is watched; `logloss` falls when it improves, the others rise. Where the objective is `cloze` it is `accuracy`."""
    patience: int = Field(default=3, ge=1)
    """Validations in a row without an improvement."""
    min_delta: float = Field(default=0.0, ge=0)
    """A smaller change is no improvement."""


class StageSpec(Section):
    """One stage; `epochs`, `steps` and `plateau` end it, one of them or, by `until`, several combined."""

    name: str
    """Its name in metrics and messages; each stage has its own."""
    objective: Literal["click", "cloze"] = "click"
    """`click`: the log loss of clicks. `cloze`: fields of behaviours that were hidden, by a family that can be pre-trained."""
    readout: ReadoutSpec = ReadoutSpec()
    trainable: tuple[Group, ...]
    """Groups of parameters that are trained; all else is frozen. `backbone` takes its norms along, `norm` trains them alone."""
    lr: dict[Group, float]
    """Learning rate per trainable group; those of other groups are ignored."""
    schedule: ScheduleSpec = ScheduleSpec()
    batch_size: int | None = Field(default=None, ge=1, le=MOST_SEQUENCES)
    """Sequences per optimiser step in this stage; null: `train.batch_size`."""
    epochs: float | None = Field(default=None, gt=0)
    """Length in passes over the train split; parts of one are allowed."""
    steps: int | None = Field(default=None, ge=1)
    """Length in optimiser steps."""
    plateau: PlateauSpec | None = None
    """Ends the stage when a validation metric no longer improves."""
    until: Literal["any", "all"] = "any"
    """Where several conditions are given: the first that is met ends the stage, or the last."""

    @property
    def learns(self) -> Objective:
        """The objective as a model is given it."""
        return Objective(kind=self.objective, readout=self.readout)

    @field_validator("lr")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        for group, rate in value.items():
            if rate <= 0:
                raise ValueError(f"the rate of {group} must be above 0, got {rate:g}; to freeze it leave it out of trainable")
            if rate > _LARGEST_RATE:
                raise ValueError(f"the rate of {group} must be at most {_LARGEST_RATE:g}, got {rate:g}")
        return value

    @model_validator(mode="after")
    def _whole(self) -> "StageSpec":
        if self.epochs is None and self.steps is None:
            if self.plateau is None:
                raise ValueError("give at least one of epochs, steps and plateau: nothing would end the stage")
            if self.schedule.kind != "constant" or self.schedule.warmup:
                raise ValueError(
                    "a stage that only a plateau ends has no length for its schedule: add steps or epochs, "
                    "or take schedule {kind: constant, warmup: 0}"
                )
        if self.plateau is not None and (self.plateau.metric == "accuracy") != (self.objective == "cloze"):
            raise ValueError(f"plateau.metric {self.plateau.metric} is not measured where the objective is {self.objective}")
        if not self.trainable or len(set(self.trainable)) != len(self.trainable):
            raise ValueError("trainable names at least one group, each once")
        return self
