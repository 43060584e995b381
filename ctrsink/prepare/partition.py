"""First task: a block of the log becomes a file of its events by user, see Pile, and a survey."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ctrsink import storage
from ctrsink.config.data import PrepareSpec
from ctrsink.dataset import splits
from ctrsink.dataset.arrow import column_numpy
from ctrsink.dataset.manifest import column_field
from ctrsink.features.columns import Column, columns_of
from ctrsink.prepare.check_rows import EVENTS_SCHEMA, check_events
from ctrsink.prepare.lookup import Lookup
from ctrsink.prepare.pile import Pile, sliced
from ctrsink.prepare.render import feedback_minima
from ctrsink.prepare.results import path_of, read_named
from ctrsink.prepare.sources.raw_log import Block, RawLog
from ctrsink.prepare.statistics import Rule, outcomes, write_received
from ctrsink.prepare.survey import Survey, count_times, read_survey, surveyed, write_survey


@dataclass(frozen=True)
class Partition:
    """All that the first tasks need."""

    spec: PrepareSpec
    source: RawLog
    blocks: tuple[Block, ...]
    folder: str
    slices: int
    """A block's file is cut into this many, a power of two, by the first bits of the prefix."""
    items: str | None
    """File of the ids of the item table, see Lookup."""

    def __call__(self, number: int) -> int:
        """Read block `number`; returns that number, once its survey is written, last."""
        raw = self.source.read(self.blocks[number])
        checked = check_events(raw, self.source.columns, read_lookup(self.items) if self.items else None, self.told)
        events = checked.events
        prefix = splits.prefixes(events.column("user").combine_chunks())
        order = np.argsort(prefix, kind="stable")
        by_prefix = events.take(pa.array(order)).append_column("prefix", pa.array(prefix[order], pa.uint16()))
        content, ends = sliced(by_prefix, 0, splits.PREFIXES, self.slices)
        seconds, counts = count_times(column_numpy(events, "timestamp", 0), self.labels(events))
        survey = Survey(
            rows=checked.rows,
            file_rows=raw.file_rows,
            header_lines=raw.header_lines,
            problem=checked.problem,
            reasons=checked.reasons,
            prefix_events=np.bincount(prefix, minlength=splits.PREFIXES),
            seconds=seconds,
            counts=counts,
            feedback=feedback_minima(self.spec.text, column_numpy(events, "feedback", np.nan)),
            items=None if self.items else events.column("item").unique().to_pylist(),
            slice_ends=ends,
            forms=checked.forms,
        )
        storage.write_bytes(path_of(self.folder, number, "events"), content)
        write_received(self.folder, number, self.received(events))
        write_survey(self.folder, number, survey)
        return number

    def done(self) -> set[int]:
        """Blocks that an earlier preparation has read already."""
        return surveyed(self.folder)

    @property
    def told(self) -> tuple[Column, ...]:
        """Columns of the log that are signals."""
        return tuple(column for column in columns_of(self.spec.columns) if column.of == "log")

    @property
    def schema(self) -> pa.Schema:
        """Of the events of a block: EVENTS_SCHEMA, the columns that are signals, the prefix."""
        return pa.schema([*EVENTS_SCHEMA, *map(column_field, self.told), pa.field("prefix", pa.uint16())])

    def survey(self, number: int) -> Survey:
        return read_survey(self.folder, number)

    def labels(self, events: pa.Table) -> np.ndarray:
        """See splits.labels."""
        return splits.labels(
            column_numpy(events, "label", splits.NO_LABEL),
            column_numpy(events, "feedback", np.nan),
            self.source.columns.label is not None,
            self.spec.positive_from,
        )

    def pile(self) -> Pile:
        """The events of all blocks, once these have been read."""
        ends = tuple(self.survey(number).slice_ends for number in range(len(self.blocks)))
        return Pile(self.folder, self.schema, len(self.blocks), 1, self.slices, ends)

    def received(self, events: pa.Table) -> pa.Table:
        """Counts of the outcomes of events, see Rule.count."""
        feedback, rated = column_numpy(events, "feedback", np.nan), self.source.columns.feedback is not None
        return Rule.of(self.spec.statistics).count(
            events.column("item").combine_chunks(),
            column_numpy(events, "timestamp", 0),
            outcomes(feedback, self.labels(events), rated),
        )


def read_lookup(path: str) -> Lookup:
    """Of all items, in the order of the item table."""
    return Lookup.from_table(read_named(path))
