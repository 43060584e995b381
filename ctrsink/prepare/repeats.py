"""Between the two: where events that were logged again are dropped, what of them the blocks' surveys have counted too much."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ctrsink.dataset import splits
from ctrsink.dataset.arrow import column_numpy
from ctrsink.prepare.execute import Execute, run_tasks
from ctrsink.prepare.partition import Partition
from ctrsink.prepare.pile import Pile
from ctrsink.prepare.statistics import negated, write_received
from ctrsink.prepare.survey import Survey, count_times, read_survey, surveyed, write_survey


@dataclass(frozen=True)
class Repeats:
    """All that these tasks need; each looks at the users of one range of prefixes, as equal events may lie in any blocks."""

    partition: Partition
    folder: str
    pile: Pile
    """All events."""
    ranges: tuple[tuple[int, int], ...]
    """Prefixes [first, end) of each task."""

    def __call__(self, number: int) -> int:
        """Write the survey of range `number`, whose counts are below 0; returns that number."""
        events = self.pile.users(*self.ranges[number])
        again = events.filter(pa.array(splits.duplicates(events)))
        seconds, counts = count_times(column_numpy(again, "timestamp", 0), self.partition.labels(again))
        survey = Survey(
            rows=-again.num_rows,
            file_rows=0,
            header_lines=None,
            problem=None,
            reasons={},
            prefix_events=-np.bincount(column_numpy(again, "prefix", 0), minlength=splits.PREFIXES),
            seconds=seconds,
            counts=-counts,
            feedback={},
            items=None,
            slice_ends=np.empty(0, np.int64),
            forms={},
        )
        write_received(self.folder, number, negated(self.partition.received(again)))
        write_survey(self.folder, number, survey)
        return number

    def done(self) -> set[int]:
        """Ranges that an earlier preparation has gone through already."""
        return surveyed(self.folder)

    def surveys(self) -> Iterator[Survey]:
        """Those of all ranges, once they are written."""
        return (read_survey(self.folder, number) for number in range(len(self.ranges)))

    def run(self, execute: Execute) -> None:
        """Write the surveys that are not yet there."""
        run_tasks(
            self,
            len(self.ranges),
            execute,
            "found, logged again,",
            lambda number: (1, -read_survey(self.folder, number).rows),
        )
