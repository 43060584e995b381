"""What an exported model knows of items: how each was received up to the end of the log, and its neighbours."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ctrsink.config.data import FieldSpec
from ctrsink.dataset.arrow import from_parquet, to_parquet
from ctrsink.dataset.column_cells import numbered, stored
from ctrsink.dataset.manifest import read_file
from ctrsink.dataset.reader import Dataset
from ctrsink.dataset.shard import read_neighbours
from ctrsink.features.columns import Column, columns_of
from ctrsink.features.counted import Counted
from ctrsink.features.neighbours import Neighbours
from ctrsink.prepare.statistics import latest

FILE = "items.parquet"
_LISTS = ("partners", "products", "common")


@dataclass(frozen=True)
class Group:
    """How items with the same value in a column were received, up to the end of the log."""

    values: list[str]
    mean: np.ndarray
    """float64 [V]."""
    count: np.ndarray
    """int64 [V]."""
    overall: float | None
    """Mean outcome of all that have a value; None: there was no outcome."""

    @classmethod
    def of(cls, cells: pa.Array, totals: bytes, strength: float) -> "Group":
        """Of the items' values in the column (see column_cells.stored), and the totals that the data set keeps of items."""
        numbers, values = numbered(cells)
        mean, count, overall = latest(totals, strength, numbers, len(values))
        return cls(values, mean, count, None if np.isnan(overall) else overall)

    @classmethod
    def load(cls, table: pa.Table, name: str, overall: float | None) -> "Group":
        """From the columns that Knowledge.dump wrote."""
        values, mean, count = (table.column(f"{key}.item.{name}").drop_null() for key in ("value", "mean", "count"))
        return cls(values.to_pylist(), mean.to_numpy(), count.to_numpy(), overall)

    @cached_property
    def _row(self) -> dict[str, int]:
        return {value: row for row, value in enumerate(self.values)}

    def received(self, cells: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Mean and count of such values, float64 each; of a new one, or where there is none, the overall mean and 0."""
        numbers, values = numbered(cells)
        rows = np.array([-1, *(self._row.get(value, -1) for value in values)])[numbers + 1] + 1
        mean = np.array([np.nan if self.overall is None else self.overall, *self.mean])
        return mean[rows], np.array([0, *self.count], np.float64)[rows]


@dataclass(frozen=True)
class Knowledge:
    """Of I items, by id."""

    ids: pa.Array
    item_mean: np.ndarray
    """float64 [I]."""
    item_count: np.ndarray
    """float64 [I]."""
    neighbours: Neighbours | None
    overall: float
    """Mean outcome of all items: what a new item's mean is drawn to."""
    outcome: Literal["feedback", "label"]
    labelled: bool
    """A behaviour's label is a value of its own; else it follows from its feedback and `positive_from`."""
    positive_from: float
    fields: tuple[FieldSpec, ...]
    window: int
    """A user's latest events that their statistics are of."""
    request_is_second: bool
    counted: Counted | None
    """What the neighbours were made of."""
    columns: tuple[Column, ...]
    """Signals that are columns."""
    named: tuple[str, ...]
    """All signals of the data set that stand in an item of a request by their names: columns of the log, outcomes by group."""
    groups: dict[str, "Group"]
    """Of columns of the item table by which outcomes are counted."""

    @cached_property
    def _row(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.ids.to_pylist())}

    def rows(self, ids: list[str | None]) -> np.ndarray:
        """Numbers of items, int64; -1 for those that were not in the log."""
        return np.array([-1 if name is None else self._row.get(name, -1) for name in ids], np.int64)

    def received(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and count of these items, float64 each; of a new one the overall mean and 0."""
        known = rows >= 0
        at = np.where(known, rows, 0)
        return np.where(known, self.item_mean[at], self.overall), np.where(known, self.item_count[at], 0.0)

    @classmethod
    def of(cls, dataset: Dataset, with_neighbours: bool, columns: tuple[str, ...]) -> "Knowledge":
        """That of a data set, of whose `columns` something is told."""
        manifest, items = dataset.manifest, dataset.read_items()
        kept, table = manifest.statistics, manifest.neighbours
        totals = read_file(dataset.uri, kept.file)
        mean, count, overall = latest(totals, kept.strength)
        told = columns_of(columns)
        by = {column.name: stored(column, items.column(column.name).combine_chunks())[0] for column in told if column.received}
        return cls(
            columns=told,
            named=tuple(column.signal for column in columns_of(manifest.columns) if column.by_event),
            groups={name: Group.of(values, totals, kept.strength) for name, values in by.items()},
            ids=items.column("id").combine_chunks(),
            item_mean=mean,
            item_count=count.astype(np.float64),
            neighbours=dataset.read_neighbours() if with_neighbours else None,
            overall=overall,
            outcome=kept.outcome,
            labelled=manifest.labelled,
            positive_from=manifest.positive_from,
            fields=kept.fields,
            window=kept.user_events,
            request_is_second=manifest.request_is_second,
            counted=Counted(table.until, table.user_events) if table is not None and with_neighbours else None,
        )

    def dump(self) -> tuple[dict[str, Any], bytes]:
        """Plain values for the model's configuration, and the file FILE; see `load`."""
        columns: dict[str, Any] = {"id": self.ids, "item_mean": self.item_mean, "item_count": self.item_count.astype(np.int64)}
        plain: dict[str, Any] = {
            "overall": None if np.isnan(self.overall) else self.overall,
            "outcome": self.outcome,
            "labelled": self.labelled,
            "positive_from": self.positive_from,
            "window": self.window,
            "request_is_second": self.request_is_second,
            "fields": [field.model_dump(mode="json") for field in self.fields],
        }
        if self.named:
            plain["named"] = list(self.named)
        if self.columns:
            plain["columns"] = [column.signal for column in self.columns]
        for name, group in self.groups.items():
            # A row of the file is an item, and there are no more values than items.
            for key, values in (
                ("value", pa.array(group.values)),
                ("mean", pa.array(group.mean)),
                ("count", pa.array(group.count)),
            ):
                missing = pa.nulls(len(self.ids) - len(values), values.type)
                columns[f"{key}.item.{name}"] = pa.concat_arrays([values, missing])
            plain.setdefault("groups", {})[name] = group.overall
        if self.neighbours is not None:
            table = self.neighbours
            # Items that were appended have no neighbours.
            missing = len(self.ids) + 1 - len(table.offsets)
            offsets = pa.array(np.append(table.offsets, np.full(missing, table.offsets[-1])).astype(np.int32))
            for name in _LISTS:
                columns[name] = pa.ListArray.from_arrays(offsets, pa.array(getattr(table, name)))
            plain |= {"variance": table.variance, "shrink": table.shrink}
            if table.by_text is not None:
                plain["text_line"] = [table.by_text.intercept, table.by_text.slope]
        if self.counted is not None:
            plain |= {"until": self.counted.until, "user_events": self.counted.user_events}
        return plain, to_parquet(pa.table(columns))

    @classmethod
    def load(cls, plain: dict[str, Any], content: bytes) -> "Knowledge":
        """What `dump` gave.

        Raises:
            KeyError, ValueError: it is damaged.
        """
        table = from_parquet(content)
        neighbours = None
        if "variance" in plain:
            neighbours = read_neighbours(content, plain["variance"], plain["shrink"], plain.get("text_line"))
        return cls(
            ids=table.column("id").combine_chunks(),
            item_mean=table.column("item_mean").to_numpy(),
            item_count=table.column("item_count").to_numpy().astype(np.float64),
            neighbours=neighbours,
            overall=np.nan if plain["overall"] is None else plain["overall"],
            outcome=plain["outcome"],
            labelled=plain["labelled"],
            positive_from=plain["positive_from"],
            window=plain["window"],
            request_is_second=plain["request_is_second"],
            counted=Counted(plain["until"], plain["user_events"]) if "until" in plain else None,
            columns=columns_of(tuple(plain.get("columns", ()))),
            named=tuple(plain.get("named", ())),
            groups={name: Group.load(table, name, overall) for name, overall in plain.get("groups", {}).items()},
            fields=tuple(FieldSpec.model_validate(field) for field in plain["fields"]),
        )
