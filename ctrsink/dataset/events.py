"""Events in memory, as arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ctrsink.features.histories import Histories
from ctrsink.features.ragged import Ragged


@dataclass(frozen=True)
class UserEvents:
    """Events of one user, oldest first; `texts` and `feedbacks` are rows of the two token tables."""

    texts: np.ndarray
    """int64 [N]."""
    feedbacks: np.ndarray
    """int64 [N]."""
    timestamps: np.ndarray
    """int64 [N], seconds."""
    labels: np.ndarray
    """int8 [N]; 0, 1, or -1 where the event is no impression."""
    known: np.ndarray | None = None
    """int64 [N]; how many events were known when this one was asked: those before its request. None: all before it."""


@dataclass(frozen=True)
class Events:
    """Events of any number of chronologies, one after another, oldest first in each; see UserEvents for the columns, [N] each."""

    texts: np.ndarray
    feedbacks: np.ndarray
    timestamps: np.ndarray
    labels: np.ndarray
    known: np.ndarray
    tokens: Ragged
    """Token table of the items' texts."""
    vectors: np.ndarray | None = field(default=None, kw_only=True)
    """float16 [rows of `tokens`, width], those of the items; zeros where unknown."""
    numbers: np.ndarray | None = field(default=None, kw_only=True)
    """float32 [N, F], told to sinks, by the layout's `numbers`."""
    target_numbers: np.ndarray | None = field(default=None, kw_only=True)
    """float32 [N, G], told to targets, by the layout's `target_numbers`."""
    base: np.ndarray | None = field(default=None, kw_only=True)
    """float32 [N]; logit of the base score, 0 where unknown."""
    categories: Mapping[str, np.ndarray] = field(default_factory=dict, kw_only=True)
    """int64 [N] each; of those that are hashed the hashes."""
    histories: Histories | None = field(default=None, kw_only=True)
    """The same events, as similarity is computed from them."""
