"""First task: a block of the log becomes a file of its events by user, which any shard can read its slice of, and a survey."""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from ctrsink import storage
from ctrsink.config.data import PrepareSpec
from ctrsink.data import chronology
from ctrsink.data.arrow import column_numpy, from_ipc, to_ipc
from ctrsink.data.events import EVENTS_SCHEMA, check_events
from ctrsink.data.prepare.statistics import Rule, outcomes
from ctrsink.data.prepare.survey import Survey, count_times
from ctrsink.data.render import feedback_minima
from ctrsink.data.sources.source import Block, Source

SLICED_SCHEMA = EVENTS_SCHEMA.append(pa.field("prefix", pa.uint16()))


@dataclass(frozen=True)
class Partition:
    """All that the first tasks need."""

    spec: PrepareSpec
    source: Source
    blocks: tuple[Block, ...]
    folder: str
    slices: int
    """A block's file is cut into this many, a power of two, by the first bits of the prefix."""
    items: str | None
    """File of the ids of the item table."""

    def __call__(self, number: int) -> int:
        """Read block `number`; returns that number, once its survey is written, last."""
        raw = self.source.read(self.blocks[number])
        columns = self.source.columns
        checked = check_events(raw, columns, read_ids(self.items) if self.items else None)
        events = checked.events
        prefix = chronology.prefixes(events.column("user").combine_chunks())
        order = np.argsort(prefix, kind="stable")
        content, ends = _sliced(events.take(pa.array(order)), prefix[order], self.slices)
        feedback = column_numpy(events, "feedback", np.nan)
        label = chronology.labels(
            column_numpy(events, "label", chronology.NO_LABEL), feedback, columns.label is not None, self.spec.positive_from
        )
        seconds, counts = count_times(column_numpy(events, "timestamp", 0), label)
        survey = Survey(
            rows=checked.rows,
            file_rows=raw.file_rows,
            header_lines=raw.header_lines,
            problem=checked.problem,
            prefix_events=np.bincount(prefix, minlength=chronology.PREFIXES),
            seconds=seconds,
            counts=counts,
            feedback=feedback_minima(self.spec.text, feedback),
            items=None if self.items else events.column("item").unique().to_pylist(),
            slice_ends=ends,
            forms=checked.forms,
        )
        rule, rated = Rule.of(self.spec.statistics), columns.feedback is not None
        received = rule.count(
            events.column("item").combine_chunks(),
            column_numpy(events, "timestamp", 0),
            outcomes(feedback, label, rated),
        )
        storage.write_bytes(self._path(number, "events"), content)
        storage.write_bytes(self._path(number, "received"), to_ipc(received))
        storage.write_bytes(self._path(number, "survey"), survey.to_bytes())
        return number

    def done(self) -> set[int]:
        """Blocks that an earlier preparation has read already."""
        return {int(name.removesuffix(".survey")) for name in storage.list_files(self.folder) if name.endswith(".survey")}

    def survey(self, number: int) -> Survey:
        return Survey.from_bytes(storage.read_bytes(self._path(number, "survey")))

    def received(self, number: int) -> pa.Table:
        """Counts of outcomes of block `number`, see Rule.count."""
        return from_ipc(storage.read_bytes(self._path(number, "received")))

    def events(self, number: int, slice_ends: np.ndarray, first: int, end: int) -> pa.Table:
        """Events of block `number` whose prefix is in [first, end), in SLICED_SCHEMA; `slice_ends` as in its Survey."""
        width = chronology.PREFIXES // self.slices
        a, b = first // width, (end - 1) // width
        starts = np.concatenate([[0], slice_ends])
        if starts[a] == starts[b + 1]:
            return SLICED_SCHEMA.empty_table()
        content = storage.read_range(self._path(number, "events"), int(starts[a]), int(starts[b + 1]))
        cuts = [int(c - starts[a]) for c in starts[a : b + 2]]
        pieces = [from_ipc(content[x:y]) for x, y in itertools.pairwise(cuts) if y > x]
        table = pa.concat_tables(pieces)
        prefix = column_numpy(table, "prefix", 0)
        low = int(np.searchsorted(prefix, first))
        return table.slice(low, int(np.searchsorted(prefix, end - 1, side="right")) - low)

    def _path(self, number: int, kind: str) -> str:
        return storage.join(self.folder, f"{number:06d}.{kind}")


def _sliced(events: pa.Table, prefix: np.ndarray, slices: int) -> tuple[bytes, np.ndarray]:
    """Arrow streams one after another, a slice each (none where it is empty), and where each ends."""
    table = events.append_column(SLICED_SCHEMA.field("prefix"), pa.array(prefix, pa.uint16()))
    edges = np.searchsorted(prefix, np.arange(slices + 1) * (chronology.PREFIXES // slices))
    pieces = [to_ipc(table.slice(a, b - a)) if b > a else b"" for a, b in zip(edges.tolist(), edges[1:].tolist(), strict=False)]
    return b"".join(pieces), np.cumsum([len(piece) for piece in pieces])


@lru_cache(maxsize=2)
def read_ids(path: str) -> pa.Array:
    """Ids of all items, in the order of the item table; a file of that name never changes."""
    return from_ipc(storage.read_bytes(path)).column("item").combine_chunks()
