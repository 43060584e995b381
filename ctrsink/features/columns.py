"""Signals that are columns of the log or of the item table, by their names.

`log.price` and `item.year` are numbers. `hashed.log.slot` and `hashed.item.brand` are categories, whose values share a table of
embeddings by a hash. `mean.item.brand` and `count.item.brand` are how items with the same value were received.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

_NAME = re.compile(r"(?:(hashed|mean|count)\.)?(log|item)\.(.+)", re.DOTALL)
UNKNOWN = -1


@dataclass(frozen=True)
class Column:
    """What such a name says."""

    signal: str
    """The name itself."""
    kind: Literal["number", "hashed", "mean", "count"]
    of: Literal["log", "item"]
    name: str
    """Of the column."""

    @property
    def by_event(self) -> bool:
        """Each event has a value of its own; else each item has."""
        return self.of == "log" or self.received

    @property
    def received(self) -> bool:
        """It is a statistic of outcomes."""
        return self.kind in ("mean", "count")

    @classmethod
    def parse(cls, signal: str) -> "Column | None":
        """None: it is no such name."""
        found = _NAME.fullmatch(signal)
        if found is None or (found[1] in ("mean", "count") and found[2] == "log"):
            return None
        return cls(signal, found[1] or "number", found[2], found[3])  # pyright: ignore[reportArgumentType]


def columns_of(signals: tuple[str, ...]) -> tuple[Column, ...]:
    """Those of `signals` that are columns."""
    return tuple(column for column in map(Column.parse, signals) if column is not None)


def in_table(hashes: np.ndarray, rows: int) -> np.ndarray:
    """Rows of a table of embeddings, `1 .. rows - 1`, int64; 0, which is for all that is unknown, where there is no hash (-1)."""
    return np.where(hashes < 0, 0, 1 + hashes % (rows - 1))
