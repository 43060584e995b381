"""What is learned of a log while its blocks are read, and what follows for all of it: bounded in memory by one block's survey."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from ctrsink import storage
from ctrsink.config.data import SplitSpec
from ctrsink.dataset.arrow import from_ipc, to_ipc
from ctrsink.dataset.manifest import SPLITS, Split, SplitCounts, SplitTimes
from ctrsink.dataset.splits import PREFIXES, split_of, split_ranks
from ctrsink.prepare.check_rows import Forms, Problem
from ctrsink.prepare.results import numbers_of, path_of

_COARSE = 12  # bits: seconds are first counted by 4,096 of them, and one by one only around the split times
FAR_YEARS = 20
"""From the median time of a log: an event that lies further away is strange."""
_KIND = "survey"
_ARRAYS = ("prefix_events", "seconds", "counts", "slice_ends")


@dataclass(frozen=True)
class Survey:
    """Of one block."""

    rows: int
    """Events, and rows that are none because they are bad."""
    file_rows: int
    header_lines: int | None
    """See RawRows."""
    problem: Problem | None
    reasons: dict[str, int]
    """See Checked."""
    prefix_events: np.ndarray
    """Events of each prefix (see chronology.prefixes), [PREFIXES]."""
    seconds: np.ndarray
    """Distinct times, ascending, int64 [T]."""
    counts: np.ndarray
    """Events, impressions and positive impressions at each of these times, int64 [3, T]."""
    feedback: dict[str, float]
    """Texts of feedback, and the smallest feedback that gives each."""
    items: list[str] | None
    """Distinct items, where there is no item table."""
    slice_ends: np.ndarray
    """Byte at which each slice of the block's file ends."""
    forms: dict[str, Forms]
    """See Checked."""

    @property
    def events(self) -> int:
        return int(self.prefix_events.sum())

    def to_bytes(self) -> bytes:
        plain = {
            "rows": self.rows,
            "file_rows": self.file_rows,
            "header_lines": self.header_lines,
            "problem": self.problem and [self.problem.row, self.problem.what, self.problem.of_file],
            "reasons": self.reasons,
            "feedback": self.feedback,
            "items": self.items,
            "forms": self.forms,
        }
        arrays = {name: pa.array([getattr(self, name).ravel()]) for name in _ARRAYS}
        return to_ipc(pa.table({"plain": [json.dumps(plain)], **arrays}))

    @classmethod
    def from_bytes(cls, content: bytes) -> "Survey":
        table = from_ipc(content)
        plain = json.loads(table.column("plain")[0].as_py())
        problem = plain.pop("problem")
        arrays = {name: table.column(name)[0].values.to_numpy() for name in _ARRAYS}
        arrays["counts"] = arrays["counts"].reshape(3, -1)
        return cls(**plain, problem=Problem(*problem) if problem else None, **arrays)


def write_survey(folder: str, number: int, survey: Survey) -> None:
    """Write the survey of a task; its being there says that the task is done."""
    storage.write_bytes(path_of(folder, number, _KIND), survey.to_bytes())


def read_survey(folder: str, number: int) -> Survey:
    """What write_survey wrote."""
    return Survey.from_bytes(storage.read_bytes(path_of(folder, number, _KIND)))


def surveyed(folder: str) -> set[int]:
    """Tasks whose surveys are there."""
    return numbers_of(folder, _KIND)


def count_times(timestamp: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`seconds` and `counts` of a Survey; `timestamp` and `label` (0, 1, or below 0 where there is none) are per event."""
    order = np.argsort(timestamp, kind="stable")  # a log is mostly in order of time, which a stable sort is quick with
    timestamp, label = timestamp[order], label[order]
    starts = np.flatnonzero(np.diff(timestamp, prepend=timestamp[:1] - 1))
    if not len(starts):
        return timestamp, np.zeros((3, 0), np.int64)
    return timestamp[starts], np.stack([np.add.reduceat(chosen, starts) for chosen in _ones(label)])


def _ones(label: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(chosen.astype(np.int64) for chosen in (label >= -1, label >= 0, label > 0))


@dataclass
class Totals:
    """Surveys added up."""

    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    prefix_events: np.ndarray = field(default_factory=lambda: np.zeros(PREFIXES, np.int64))
    feedback: dict[str, float] = field(default_factory=dict)
    items: set[str] = field(default_factory=set)
    coarse: dict[int, int] = field(default_factory=dict)
    """Impressions by time."""
    forms: dict[str, Forms] = field(default_factory=dict)
    coarse_events: dict[int, int] = field(default_factory=dict)
    """Events by time."""
    impressions: int = 0
    first_time: int = 2**63 - 1
    last_time: int = -(2**63)

    def add(self, survey: Survey) -> None:
        self.rows += survey.rows
        self.prefix_events += survey.prefix_events
        self.items.update(survey.items or ())
        self.reasons.update(survey.reasons)
        for text, value in survey.feedback.items():
            self.feedback[text] = min(value, self.feedback.get(text, value))
        for column, found in survey.forms.items():
            self.forms[column] = found | self.forms.get(column, {})
        if not len(survey.seconds):
            return
        self.first_time = min(self.first_time, int(survey.seconds[0]))
        self.last_time = max(self.last_time, int(survey.seconds[-1]))
        self.impressions += int(survey.counts[1].sum())
        bins, at = np.unique(survey.seconds >> _COARSE, return_inverse=True)
        for found, counts in ((self.coarse_events, survey.counts[0]), (self.coarse, survey.counts[1])):
            for bin_, count in zip(bins.tolist(), np.bincount(at, counts).astype(np.int64).tolist(), strict=True):
                found[bin_] = found.get(bin_, 0) + count

    @property
    def events(self) -> int:
        return int(self.prefix_events.sum())

    def strays(self) -> tuple[int, int]:
        """The median time of the events, about, and how many lie further than FAR_YEARS from it; there must be some events."""
        times = np.array(sorted(self.coarse_events))
        counts = np.array([self.coarse_events[time] for time in times.tolist()])
        median = times[np.searchsorted(np.cumsum(counts), counts.sum() / 2)]
        return int(median) << _COARSE, int(counts[np.abs(times - median) << _COARSE > FAR_YEARS * 365.25 * 86_400].sum())


def split_times(totals: Totals, surveys: Callable[[], Iterator[Survey]], spec: SplitSpec) -> SplitTimes:
    """The times of `spec`, or where its shares of the impressions end, about; there must be some impressions."""
    if spec.train_end is not None and spec.valid_end is not None:
        return SplitTimes(train_from=spec.train_from, train_end=spec.train_end, valid_end=spec.valid_end)
    assert spec.shares is not None
    bins = np.array(sorted(totals.coarse))
    ends = np.cumsum([totals.coarse[b] for b in bins.tolist()])
    ranks = split_ranks(totals.impressions, *spec.shares)
    wanted = [int(np.searchsorted(ends, rank, side="right")) for rank in ranks]
    fine: dict[int, dict[int, int]] = {w: {} for w in wanted}
    for survey in surveys():
        for w, found in fine.items():
            a, b = np.searchsorted(survey.seconds, [bins[w] << _COARSE, (bins[w] + 1) << _COARSE])
            for second, count in zip(survey.seconds[a:b].tolist(), survey.counts[1, a:b].tolist(), strict=True):
                found[second] = found.get(second, 0) + count
    cuts = [_at_rank(fine[w], rank - (int(ends[w - 1]) if w else 0)) for w, rank in zip(wanted, ranks, strict=True)]
    return SplitTimes(train_end=cuts[0], valid_end=cuts[1])


def _at_rank(counts: dict[int, int], rank: int) -> int:
    seconds = sorted(counts)
    return seconds[int(np.searchsorted(np.cumsum([counts[s] for s in seconds]), rank, side="right"))]


def count_splits(surveys: Iterator[Survey], times: SplitTimes) -> dict[Split, SplitCounts]:
    """Impressions and positives of each split."""
    sums = np.zeros((2, len(SPLITS)), np.int64)
    for survey in surveys:
        split = split_of(survey.seconds, times)
        for number in range(len(SPLITS)):
            sums[:, number] += survey.counts[1:, split == number].sum(1)
    return {name: SplitCounts(impressions=int(sums[0, i]), positives=int(sums[1, i])) for i, name in enumerate(SPLITS)}
