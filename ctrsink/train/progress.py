"""How far a run is."""

from dataclasses import dataclass, field

import torch

from ctrsink.train.checkpoint.checkpoint import Checkpoint
from ctrsink.train.engine import EngineState
from ctrsink.train.observe.audit import Audit


@dataclass
class Progress:
    """How far the run is, and what earlier stages left behind."""

    position: int = 0
    """Of the stream: sequences consumed."""
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    """Values of everything trained so far, as of the last rebuild of the engine."""
    state: EngineState | None = None
    trained: Audit = field(default_factory=Audit)
    """Impressions trained on before this process began, by all ranks."""
    seconds: float = 0.0
    """Spent in training steps."""
    precision: str = ""
    """That of the run, empty before it has begun."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Progress":
        """As the checkpoint has it."""
        return cls(
            checkpoint.position,
            checkpoint.parameters,
            EngineState({}, checkpoint.moments, checkpoint.steps),
            Audit(**checkpoint.trained),
            checkpoint.seconds,
            checkpoint.precision,
        )
