"""What the data set decides on, handed to a family once; apart from what takes torch, and so a second, to import."""

from dataclasses import dataclass

import numpy as np

from ctrsink.dataset.manifest import Manifest
from ctrsink.features.ragged import Ragged


@dataclass(frozen=True)
class Facts:
    """What a model is built from beside its section of the configuration: sizes that the data set has."""

    vocabulary: int
    """Tokens of its tokenizer."""
    items: int
    """Of its item table."""
    feedbacks: int
    """Different texts of feedback, no feedback among them: values of the signal `feedback`."""


def facts_of(manifest: Manifest, vocabulary: int) -> Facts:
    """Of a data set whose tokenizer has so many tokens."""
    return Facts(vocabulary, manifest.item_count, len(manifest.feedback_texts))


@dataclass(frozen=True)
class Wording:
    """What every sequence of text is made with, beside the texts of items."""

    feedbacks: Ragged
    """Tokens of each text of feedback."""
    prefix: np.ndarray
    """int64; tokens at the start."""
