"""What the data set decides on, handed to a family once; apart from what takes torch, and so a second, to import."""

from dataclasses import dataclass

import numpy as np

from ctrsink.features.ragged import Ragged


@dataclass(frozen=True)
class Facts:
    """What a model is built from beside its section of the configuration."""

    vocabulary: int
    """Tokens of the data set's tokenizer, or of the model's own."""


@dataclass(frozen=True)
class Wording:
    """What every sequence of text is made with, beside the texts of items."""

    feedbacks: Ragged
    """Tokens of each text of feedback."""
    prefix: np.ndarray
    """int64; tokens at the start."""
