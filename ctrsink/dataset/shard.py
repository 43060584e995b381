"""A shard in memory: its events as arrays, and what a layout tells of them."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa

from ctrsink.dataset.arrow import from_parquet, pc, unpack
from ctrsink.dataset.column_cells import known
from ctrsink.dataset.events import Events, UserEvents
from ctrsink.dataset.known import known_events
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.manifest import VECTOR, Manifest, ShardEntry
from ctrsink.features.categories import categories, hashes
from ctrsink.features.columns import UNKNOWN, columns_of
from ctrsink.features.counted import Counted
from ctrsink.features.fields import hashed
from ctrsink.features.histories import Histories
from ctrsink.features.neighbours import ByText, Neighbours
from ctrsink.features.numbers import z_scores
from ctrsink.features.ragged import Ragged

E = TypeVar("E", bound=Events)


@dataclass(frozen=True)
class Shard(Events):
    """A shard in memory, [N] events of all its users one after another; `texts` are rows of its own token table."""

    offsets: np.ndarray
    """int64 [users + 1]; rows of each user."""
    items: np.ndarray
    """Rows of the item table, [N]."""
    impressions: np.ndarray
    """Rows with a label, ascending."""
    users: np.ndarray
    """Ids, strings of numpy."""

    def chronology(self, row: int) -> UserEvents:
        a, b = self.offsets[row], self.offsets[row + 1]
        return UserEvents(self.texts[a:b], self.feedbacks[a:b], self.timestamps[a:b], self.labels[a:b], self.known[a:b])


@dataclass(frozen=True)
class Knowing:
    """What turns a shard's columns into Histories."""

    outcome: Literal["feedback", "label"]
    counted: Counted | None
    """None: there are no neighbours, or the shard is of a later part than they are."""
    window: int
    """See Histories."""
    columns: tuple[str, ...] = ()
    """Signals that are columns, of which something is to be known."""
    users: bool = False
    """Who each event's user is, is to be known."""
    neighbours: Neighbours | None = None

    @classmethod
    def of(
        cls, manifest: Manifest, entry: ShardEntry, neighbours: Neighbours | None, columns: tuple[str, ...], users: bool = False
    ) -> "Knowing":
        table = manifest.neighbours
        counted = Counted(table.until, table.user_events) if table is not None and entry.part == 0 else None
        return cls(manifest.statistics.outcome, counted, manifest.statistics.user_events, columns, users, neighbours)

    def histories(self, events: pa.Table, tokens: pa.Table) -> Histories:
        """Of a shard's events, in their columns `shard_schema(columns)`, and its sidecar."""
        flat = _Flat(events)
        counts = flat.lengths
        begins = (np.cumsum(counts) - counts).repeat(counts)
        labels = flat.labels
        outcome = flat.numbers("feedback") if self.outcome == "feedback" else np.where(labels >= 0, labels, np.nan)
        items = flat.of("item").to_numpy()
        timestamps = flat.of("timestamp").to_numpy()
        inside = counted = np.zeros(len(items), np.bool_)
        if self.counted is not None:
            inside, counted = self.counted.of(timestamps, begins, counts)
        of_items = _lists(tokens, "fields")
        rows = np.searchsorted(tokens["item"].to_numpy(), items)
        return Histories(
            begins=begins,
            known=known_events(flat.of("request"), counts).astype(np.int64),
            timestamps=timestamps,
            outcome=outcome.astype(np.float64),
            labels=labels,
            item_mean=flat.numbers("item_mean").astype(np.float64),
            item_count=flat.of("item_count").to_numpy().astype(np.float64),
            items=items.astype(np.int64),
            counted=counted,
            inside=inside,
            fields=Ragged(of_items.take(rows), np.append(0, of_items.lengths(rows).cumsum())),
            neighbours=self.neighbours,
            vectors=unpack(tokens[VECTOR]) if self.neighbours is not None and self.neighbours.by_text else None,
            texts=rows,
            columns={
                column.signal: known(column, flat.of(column.signal) if column.by_event else tokens[column.signal].take(rows))
                for column in columns_of(self.columns)
            },
            users=user_hashes(events["user"].to_pylist()).repeat(counts) if self.users else None,
            window=self.window,
        )


def to_shard(events: pa.Table, tokens: pa.Table, layout: Layout | None, knowing: Knowing) -> Shard:
    """The shard of a file of events and its sidecar, with what `layout` tells of them."""
    flat = _Flat(events)
    items, labels = flat.of("item").to_numpy(), flat.labels
    shard = Shard(
        texts=np.searchsorted(tokens["item"].to_numpy(), items).astype(np.int32),
        feedbacks=flat.of("feedback_id").to_numpy(),
        timestamps=flat.of("timestamp").to_numpy(),
        labels=labels,
        known=known_events(flat.of("request"), flat.lengths),
        tokens=_lists(tokens, "tokens"),
        offsets=np.append(0, np.cumsum(flat.lengths)),
        items=items,
        impressions=np.flatnonzero(labels >= 0).astype(np.int32),
        vectors=unpack(tokens[VECTOR]) if VECTOR in tokens.column_names else None,
        users=np.array(events["user"].to_pylist(), np.dtypes.StringDType()),
    )
    if layout is None:
        return shard
    return with_told(shard, layout, knowing.histories(events, tokens) if layout.events_of_signals else None)


def with_told(events: E, layout: Layout, histories: Histories | None, feedbacks: np.ndarray | None = None) -> E:
    """The events with what `layout` tells of them.

    Args:
        histories: of the same events; needed where the layout has numbers, or similarity by neighbours.
        feedbacks: their numbers in the data set, where those of the events are others [N].
    """
    names = (*layout.signals, *layout.target_signals)
    rated = events.feedbacks if feedbacks is None else feedbacks
    told = categories(names, events.timestamps, rated, layout.utc_offset_hours)
    if histories is None:
        return replace(events, categories=told)
    base = None if layout.base is None else np.nan_to_num(histories.columns[layout.base]).astype(np.float32)
    found = replace(events, categories=told | hashes(names, histories), base=base)
    every = tuple(dict.fromkeys((*layout.numbers, *layout.target_numbers)))
    z = z_scores(every, histories, {name: (mean, deviation) for name, mean, deviation in layout.scales})
    return replace(
        found,
        numbers=np.ascontiguousarray(z[:, [every.index(name) for name in layout.numbers]]),
        target_numbers=np.ascontiguousarray(z[:, [every.index(name) for name in layout.target_numbers]]),
        histories=histories if layout.compares_neighbours else None,  # they are large
    )


def user_hashes(ids: list[str | None]) -> np.ndarray:
    """Of ids of users, int64 [N]; -1 where one is unknown."""
    return np.array([UNKNOWN if name is None else hashed("user", name) for name in ids], np.int64)


class _Flat:
    """The lists of a shard's table, one after another."""

    def __init__(self, events: pa.Table) -> None:
        self._events = events

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self._events["item"].combine_chunks().offsets.to_numpy())

    @cached_property
    def labels(self) -> np.ndarray:
        return self.of("label").fill_null(-1).to_numpy()

    def of(self, name: str) -> pa.Array:
        return self._events[name].combine_chunks().flatten()

    def numbers(self, name: str) -> np.ndarray:
        """NaN where there is none."""
        return pc.fill_null(self.of(name), np.nan).to_numpy(zero_copy_only=False)


def _lists(table: pa.Table, name: str) -> Ragged:
    lists = table[name].combine_chunks()
    return Ragged(lists.flatten().to_numpy(), np.append(0, np.cumsum(np.diff(lists.offsets.to_numpy()))))


def read_neighbours(content: bytes, variance: float, shrink: float, text_line: tuple[float, float] | None = None) -> Neighbours:
    """The table of neighbours in a Parquet file with `partners`, `products` and `common` of each item."""
    table = from_parquet(content)
    partners = _lists(table, "partners")
    products, common = (_lists(table, name).values for name in ("products", "common"))
    by_text = None if text_line is None else ByText(*text_line)
    return Neighbours(partners.offsets, partners.values, products, common, variance, shrink, by_text)
