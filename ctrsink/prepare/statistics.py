"""How items were received, by period: counted block by block, merged, and looked up as of the last full period before an event.

No state travels between tasks, no order of all events is needed, and sums are whole numbers: the same bytes however the log is
cut. `append` goes on from the totals that a data set keeps.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pyarrow as pa

from ctrsink import storage
from ctrsink.config.data import StatisticsSpec
from ctrsink.dataset.arrow import from_ipc, from_parquet, pc, to_ipc
from ctrsink.errors import InputError
from ctrsink.prepare.lookup import Lookup
from ctrsink.prepare.results import path_of, read_named

PERIODS = {"hour": 3600, "day": 86400, "week": 7 * 86400}
_PART = 2.0**32  # an outcome is a whole number and so many parts of one: sums of both are exact in any order
_LARGEST = 2.0**40
_SUMS = ("count", "whole", "part")
_HELD = 8_000_000  # rows of counts that wait to be merged


@dataclass(frozen=True)
class Rule:
    """How outcomes are counted."""

    period_s: int
    strength: float

    @classmethod
    def of(cls, spec: StatisticsSpec) -> "Rule":
        return cls(PERIODS[spec.period], spec.strength)

    def periods(self, timestamps: np.ndarray) -> np.ndarray:
        """In which period each moment lies, int64."""
        return timestamps.astype(np.int64) // self.period_s

    def count(self, item: pa.Array, timestamps: np.ndarray, outcome: np.ndarray) -> pa.Table:
        """Counts and sums of the outcomes, a row per `item` and `period` that has any.

        Args:
            outcome: float64 [N], NaN where there is none.

        Raises:
            InputError: an outcome is too large to be averaged.
        """
        if len(outcome) and np.nanmax(np.abs(outcome), initial=0.0) > _LARGEST:
            raise InputError(f"a feedback of {np.nanmax(np.abs(outcome)):g} is too large to be averaged: scale the column")
        has = ~np.isnan(outcome)
        whole = np.floor(outcome[has])
        table = pa.table(
            {
                "item": item.filter(pa.array(has)),
                "period": self.periods(timestamps[has]),
                "count": np.ones(int(has.sum()), np.int64),
                "whole": whole.astype(np.int64),
                "part": np.round((outcome[has] - whole) * _PART).astype(np.int64),
            }
        )
        return _merged(table)


def outcomes(feedback: np.ndarray, label: np.ndarray, rated: bool) -> np.ndarray:
    """What is averaged of each event, float64 [N], NaN where there is nothing: the feedback of a `rated` log, else the label."""
    return feedback.astype(np.float64) if rated else np.where(label >= 0, label, np.nan)


@dataclass(frozen=True)
class Received:
    """The outcomes of all items, a row per item and period, ascending."""

    item: np.ndarray
    """int64 [R]; row of the item table."""
    period: np.ndarray
    count: np.ndarray
    """int64 [R]; in this period and those before it."""
    whole: np.ndarray
    part: np.ndarray
    """Their sum is `whole + part / 2^32`."""

    @classmethod
    def of(cls, blocks: Iterable[pa.Table], ids: Lookup, before: pa.Table | None) -> "Received":
        """Merge the counts of blocks (see Rule.count); `before`: totals that a data set keeps, see `totals`."""
        waiting = [] if before is None else [before]
        rows = 0
        for block in blocks:
            number = ids.find(block.column("item")).astype(np.int64)
            waiting.append(block.set_column(0, "item", pa.array(number)))
            rows += block.num_rows
            if rows > _HELD:
                waiting, rows = [_merged(pa.concat_tables(waiting))], 0
        return cls._of(_merged(pa.concat_tables(waiting)))

    @classmethod
    def _of(cls, counts: pa.Table) -> "Received":
        """Of counts and sums of each period."""
        table = counts.sort_by([("item", "ascending"), ("period", "ascending")])
        item, period, *sums = (table.column(name).to_numpy() for name in ("item", "period", *_SUMS))
        return cls(item, period, *(_within(item, column) for column in sums))

    def grouped(self, groups: np.ndarray) -> "Received":
        """The same of groups of items: `groups[item]` is the number of an item's group, -1 where it has none."""
        opens = np.diff(self.item, prepend=-1) != 0
        group = groups[self.item]
        inside = {name: _inside(getattr(self, name), opens) for name in _SUMS}
        table = pa.table({"item": group, "period": self.period, **inside}).filter(pa.array(group >= 0))
        return Received._of(_merged(table))

    def to_table(self) -> pa.Table:
        return pa.table({name: getattr(self, name) for name in ("item", "period", *_SUMS)})

    @classmethod
    def from_table(cls, table: pa.Table) -> "Received":
        return cls(*(table.column(name).to_numpy() for name in ("item", "period", *_SUMS)))

    def before(self, rule: Rule, items: np.ndarray, timestamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Smoothed mean, float64 [N], NaN where there was no outcome at all, and count, int64 [N], before each event's period."""
        periods = rule.periods(timestamps)
        low = min(self.period.min(initial=0), periods.min(initial=0))
        width = max(self.period.max(initial=0), periods.max(initial=0)) - low + 1
        keys = self.item * width + self.period - low
        place = np.searchsorted(keys, items * width + periods - low) - 1
        if not len(keys):
            return np.full(len(items), np.nan), np.zeros(len(items), np.int64)
        known = (place >= 0) & (self.item[place] == items)
        count, total = np.where(known, self.count[place], 0), np.where(known, self._sums[place], 0.0)
        found, means = self._overall
        overall = means[np.searchsorted(found, periods)]
        return (total + rule.strength * overall) / (count + rule.strength), count

    def totals(self, items: int) -> tuple[pa.Table, int]:
        """A row per item: its outcomes before the last period of all, and in it; and that period.

        The last period is kept apart: what is appended may still lie in it, and must not know it.
        """
        last = int(self.period.max()) if len(self.period) else 0
        ends = np.searchsorted(self.item, np.arange(items), side="right") - 1
        columns: dict[str, np.ndarray] = {}
        older = np.searchsorted(self.item * 2 + (self.period == last), np.arange(items) * 2, side="right") - 1
        for name in _SUMS:
            column = getattr(self, name)
            every, early = (
                np.where((at >= 0) & (self.item[np.maximum(at, 0)] == np.arange(items)), column[np.maximum(at, 0)], 0)
                if len(column)
                else np.zeros(items, np.int64)
                for at in (ends, older)
            )
            columns |= {f"{name}_before": early, f"{name}_last": every - early}
        return pa.table(columns), last

    @cached_property
    def _sums(self) -> np.ndarray:
        return self.whole + self.part / _PART

    @cached_property
    def _overall(self) -> tuple[np.ndarray, np.ndarray]:
        """The periods that have outcomes, [P], and the mean outcome of all items before each and behind all, [P + 1]."""
        found, which = np.unique(self.period, return_inverse=True)
        opens = np.diff(self.item, prepend=-1) != 0
        total = np.zeros((3, len(found) + 1))
        for row, name in enumerate(_SUMS):
            column = getattr(self, name)
            total[row, 1:] = np.cumsum(np.bincount(which, _inside(column, opens), len(found)))
        with np.errstate(invalid="ignore"):
            return found, (total[1] + total[2] / _PART) / np.where(total[0] > 0, total[0], np.nan)


def totals_as_counts(content: bytes, last: int) -> pa.Table:
    """The totals of a data set as counts to go on from: what came before the last period lies in the period before it."""
    table = from_parquet(content)
    items = np.arange(table.num_rows)
    pieces = [
        pa.table(
            {"item": items, "period": np.full(len(items), period)}
            | {name: table.column(f"{name}_{kind}").to_numpy() for name in _SUMS}
        )
        for kind, period in (("before", last - 1), ("last", last))
    ]
    table = pa.concat_tables(pieces)
    return table.filter(pc.greater(table.column("count"), 0))


def latest(
    content: bytes, strength: float, groups: np.ndarray | None = None, number: int = 0
) -> tuple[np.ndarray, np.ndarray, float]:
    """Smoothed mean and count of every item at the end of the log, float64 and int64 [items], and the mean of all outcomes.

    Args:
        content: a data set's totals, see Received.totals.
        groups: the same of so many `number` of groups: that of each item, -1 where it has none.
    """
    table = from_parquet(content)
    count, whole, part = (table.column(f"{n}_before").to_numpy() + table.column(f"{n}_last").to_numpy() for n in _SUMS)
    if groups is not None:
        count, whole, part = (_summed(column, groups, number) for column in (count, whole, part))
    sums = whole + part / _PART
    overall = float(sums.sum() / count.sum()) if count.sum() else float("nan")
    return (sums + strength * overall) / (count + strength), count, overall


def write_received(folder: str, number: int, counts: pa.Table) -> None:
    """Keep what task `number` has counted, see Rule.count."""
    storage.write_bytes(path_of(folder, number, "received"), to_ipc(counts))


def counts_in(folder: str, tasks: int) -> Iterator[pa.Table]:
    """What as many tasks have counted."""
    return (from_ipc(storage.read_bytes(path_of(folder, number, "received"))) for number in range(tasks))


def negated(counts: pa.Table) -> pa.Table:
    """Counts that take back what was counted."""
    for place, name in enumerate(_SUMS, start=2):
        counts = counts.set_column(place, name, pc.negate(counts.column(name)))
    return counts


@lru_cache(maxsize=8)
def read_received(path: str) -> Received:
    """A file of that name never changes."""
    return Received.from_table(read_named(path))


def _merged(table: pa.Table) -> pa.Table:
    found = table.group_by(["item", "period"], use_threads=False).aggregate([(name, "sum") for name in _SUMS])
    return found.rename_columns([name.removesuffix("_sum") for name in found.column_names]).select(["item", "period", *_SUMS])


def _summed(column: np.ndarray, groups: np.ndarray, number: int) -> np.ndarray:
    """Sums over the items of each group, int64 [number]."""
    out = np.zeros(number, np.int64)
    np.add.at(out, groups[groups >= 0], column[groups >= 0])
    return out


def _inside(column: np.ndarray, opens: np.ndarray) -> np.ndarray:
    """What running totals grew by in each row; `opens`: they begin anew there."""
    return column - np.where(opens, 0, np.concatenate([[0], column[:-1]]))


def _within(item: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Running totals within each item."""
    sums = np.cumsum(column)
    opens = np.flatnonzero(np.diff(item, prepend=-1))
    base = np.where(opens > 0, sums[opens - 1], 0)
    return sums - base.repeat(np.diff(np.append(opens, len(item))))
