"""How far a run is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ctrsink.tables.shares import Share
from ctrsink.train.checkpoint.checkpoint import Checkpoint
from ctrsink.train.engine import EngineState
from ctrsink.train.observe.audit import Audit


@dataclass
class Progress:
    """How far the run is, and what earlier stages left behind."""

    position: int = 0
    """Of the stream: sequences consumed."""
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Values of everything trained so far that the present engine leaves as it is."""
    state: EngineState | None = None
    tables: dict[str, Share] | None = None
    """This rank's rows of sharded tables, for the next engine; None before the first."""
    trained: Audit = field(default_factory=Audit)
    """Impressions trained on before this process began, by all ranks."""
    seconds: float = 0.0
    """Spent in training steps."""
    precision: str = ""
    """That of the run, empty before it has begun."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Progress":
        """As a checkpoint has it."""
        return cls(
            position=checkpoint.position,
            parameters=checkpoint.parameters,
            state=EngineState({}, checkpoint.moments, checkpoint.steps),
            tables=checkpoint.tables,
            trained=Audit(**checkpoint.trained),
            seconds=checkpoint.seconds,
            precision=checkpoint.precision,
        )
