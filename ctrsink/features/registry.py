"""The registry of signals: what each tells, of what, what it needs, and the one function that computes it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np

from ctrsink.features import user
from ctrsink.features.columns import Column
from ctrsink.features.histories import Histories

Need = Literal["columns", "fields", "neighbours", "vectors"]
Side = Literal["behaviour", "target"]


@dataclass(frozen=True)
class Signal:
    """What a sink, or a target, is told."""

    kind: Literal["bucket", "category", "number"]
    """`bucket`: a number in buckets with an embedding each. `category`: an embedding for each value. `number`: a z-score."""
    sides: tuple[Side, ...]
    """Whom it can be told of: a behaviour, whose outcome is known, or a target."""
    number: Callable[[Histories], np.ndarray] | None = None
    """Of every event, float64 [N], NaN where unknown; for numbers."""
    needs: tuple[Need, ...] = ()
    """What the data set must have been prepared with."""
    values: int | None = None
    """Of a category: how many there are, where the data set does not decide on it."""
    hashed: bool = False
    """Of a category: its values are numbers without end, which share the rows of a table."""
    identity: bool = False
    """It says who or which, not what: rows of its own parameter group, dropped at random in training."""
    depends_on_target: bool = False
    """A behaviour has another value for every target, so that targets cannot share it."""


_BEHAVIOUR: tuple[Side, ...] = ("behaviour",)
_BOTH: tuple[Side, ...] = ("behaviour", "target")


def _bucket(depends_on_target: bool = False, needs: tuple[Need, ...] = ()) -> Signal:
    return Signal("bucket", _BEHAVIOUR, needs=needs, depends_on_target=depends_on_target)


SIGNALS: dict[str, Signal] = {
    # Where a behaviour lies (CTR-Sink, arXiv 2508.03668).
    "recency_rank": _bucket(depends_on_target=True),
    "time_gap": _bucket(depends_on_target=True),
    "previous_gap": _bucket(),
    "similarity": _bucket(depends_on_target=True, needs=("vectors",)),
    "random": _bucket(),
    "none": _bucket(),
    # What a behaviour means.
    "feedback": Signal("category", _BEHAVIOUR),
    "deviation": Signal("number", _BEHAVIOUR, lambda h: np.where(h.has, h.deviation, np.nan)),
    # When.
    "hour": Signal("category", _BOTH, values=24),
    "weekday": Signal("category", _BOTH, values=7),
    # Who and which.
    "item_id": Signal("category", _BOTH, hashed=True, identity=True),
    "user_id": Signal("category", ("target",), hashed=True, identity=True),
    # What is known of the item.
    "item_mean": Signal("number", _BOTH, lambda h: h.item_mean),
    "item_count": Signal("number", _BOTH, lambda h: np.log1p(h.item_count)),
    # What is known of the user.
    "user_res": Signal("number", _BOTH, lambda h: h.user_res),
    "expected": Signal("number", _BOTH, lambda h: h.item_mean + h.user_res),
    "user_std": Signal("number", _BOTH, user.user_std),
    "user_count": Signal("number", _BOTH, user.user_count),
    "recent2": Signal("number", _BOTH, partial(user.recent, latest=2, drawn=1.0)),
    "recent5": Signal("number", _BOTH, partial(user.recent, latest=5, drawn=2.0)),
    "recent20": Signal("number", _BOTH, partial(user.recent, latest=20, drawn=4.0)),
    "recent_rate": Signal("number", _BOTH, user.recent_rate),
    "field_res": Signal("number", _BOTH, user.field_res, needs=("fields",)),
    # Not of behaviours: of those in the training range the user's own part is taken out, which a request does not know.
    "affinity": Signal("number", ("target",), user.affinity, needs=("neighbours",)),
    "affinity_rate": Signal("number", ("target",), user.affinity_rate, needs=("neighbours",)),
    "familiarity": Signal("number", ("target",), user.familiarity, needs=("neighbours",)),
}


@lru_cache(maxsize=4096)
def find(name: str) -> Signal | None:
    """The signal of that name, of the registry or of a column (see features.columns); None: there is none."""
    if name in SIGNALS:
        return SIGNALS[name]
    column = Column.parse(name)
    if column is None:
        return None
    if column.kind == "hashed":
        return Signal("category", _BOTH, needs=("columns",), hashed=True)
    return Signal("number", _BOTH, partial(_of_column, name=name, logarithm=column.kind == "count"), needs=("columns",))


def signal(name: str) -> Signal:
    """As `find`, of a name that there is."""
    found = find(name)
    if found is None:
        raise KeyError(name)
    return found


def _of_column(h: Histories, name: str, logarithm: bool) -> np.ndarray:
    return np.log1p(h.columns[name]) if logarithm else h.columns[name]


def of_kind(names: tuple[str, ...], numbers: bool) -> tuple[str, ...]:
    """Those of `names` that are numbers, or those that are not."""
    return tuple(name for name in names if (signal(name).kind == "number") == numbers)


def numbers_with(has: tuple[Need, ...], columns: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of the numbers that can be computed with what a data set has, its `columns` among them."""
    own = (name for name, found in SIGNALS.items() if found.kind == "number" and set(found.needs) <= set(has))
    return (*own, *of_kind(columns, numbers=True))
