"""Events in files by user, from which a task gathers those of its users; and merging, so that it need not ask every block.

As many files as blocks, each asked by every shard, are requests that grow with the square of the log. Merging takes the files
of `fan` blocks and makes `fan` files of them, each of all these blocks and of a `fan`th of the users: the events are written
once more, and a shard asks `fan` times fewer files. It is done as often as the shards' reads would be too small otherwise.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ctrsink import storage
from ctrsink.dataset import splits
from ctrsink.dataset.arrow import column_numpy, from_ipc, to_ipc
from ctrsink.prepare.execute import Execute, run_tasks
from ctrsink.prepare.job import Job
from ctrsink.prepare.results import numbers_of, path_of

FAN = 64
SMALL_BYTES = 2**16
"""A read of fewer bytes costs about as much as one of so many: what a storage takes to answer at all."""
MAX_SLICES = 1024


class Span(NamedTuple):
    """A read of one request: the slices [a, b) of a file, the bytes [start, end)."""

    file: int
    a: int
    b: int
    start: int
    end: int


@dataclass(frozen=True)
class Pile:
    """The events of a log: `groups` of blocks in the order of the log, each with a file for each of `ranges` of prefixes."""

    folder: str
    schema: pa.Schema
    """Of the events; `prefix` is one of the columns."""
    groups: int
    ranges: int
    """Of equal width; a power of two, like `slices`."""
    slices: int
    """Of a file, which are Arrow streams one after another, of equal ranges of prefixes; an empty one has no bytes."""
    ends: tuple[np.ndarray, ...]
    """Byte at which each slice ends, of file `group * ranges + range`."""

    @property
    def bytes(self) -> int:
        return sum(int(ends[-1]) for ends in self.ends)

    def spans(self, first: int, end: int, groups: range | None = None) -> Iterator[Span]:
        """What is read for the users whose prefix is in [first, end), in the order of the log; of some groups, or of all."""
        every = range(self.groups) if groups is None else groups
        return (span for group in every for span in self._of_group(group, first, end))

    def users(self, first: int, end: int, groups: range | None = None) -> pa.Table:
        """Their events, each user's in the order of the log."""
        pieces = [self._read(span, first, end) for span in self.spans(first, end, groups)]
        return pa.concat_tables([self.schema.empty_table(), *pieces])

    def _of_group(self, group: int, first: int, end: int) -> Iterator[Span]:
        width = splits.PREFIXES // (self.ranges * self.slices)
        low, high = first // width, (end - 1) // width + 1  # slices, numbered through all ranges
        for place in range(low // self.slices, (high - 1) // self.slices + 1):
            file, begin = group * self.ranges + place, place * self.slices
            a, b = max(low - begin, 0), min(high - begin, self.slices)
            start, stop = int(self.ends[file][a - 1]) if a else 0, int(self.ends[file][b - 1])
            if start < stop:
                yield Span(file, a, b, start, stop)

    def _read(self, span: Span, first: int, end: int) -> pa.Table:
        content = storage.read_range(path_of(self.folder, span.file, "events"), span.start, span.end)
        cuts = [0, *(int(stop) - span.start for stop in self.ends[span.file][span.a : span.b])]
        table = pa.concat_tables([from_ipc(content[x:y]) for x, y in itertools.pairwise(cuts) if y > x])
        prefix = column_numpy(table, "prefix", 0)
        low = int(np.searchsorted(prefix, first))
        return table.slice(low, int(np.searchsorted(prefix, end - 1, side="right")) - low)


@dataclass(frozen=True)
class Shape:
    """How a pile is cut, before there is one; see Pile."""

    groups: int
    ranges: int
    slices: int

    @property
    def fan(self) -> int:
        """How many files a merging task reads, and in how many parts each is read: a task holds as much as is in a file."""
        return min(FAN, self.slices)

    def reads(self, shards: int) -> int:
        """Requests of so many shards, at most: a shard that reaches over the edge of a range asks two files of a group."""
        return self.groups * (shards + self.ranges - 1)

    def merged(self, shards: int) -> "Shape":
        """The shape after merging."""
        ranges = self.ranges * self.fan
        return Shape(-(-self.groups // self.fan), ranges, slices(shards / ranges, splits.PREFIXES // ranges))

    def merging(self) -> int:
        """Requests of a merging: each file is read by `fan` tasks; a task writes a file and its ends, and these are read."""
        return self.groups * self.ranges * self.fan + 3 * -(-self.groups // self.fan) * self.ranges * self.fan


def slices(shards: float, most: int = MAX_SLICES) -> int:
    """Slices of a file in which so many shards lie: about twice as many, so that a shard reads little in vain; a power of two."""
    return min(2 ** max(0, int(np.ceil(np.log2(max(2 * shards, 1))))), MAX_SLICES, most)


def plan(shape: Shape, total_bytes: int, shards: int) -> tuple[Shape, ...]:
    """The shapes that a pile takes on by merging; none where its shards' reads are large enough, or would not become fewer.

    So there are about `total_bytes / SMALL_BYTES` requests by shards at most, and `fan + 3` per file and merging.
    """
    found: list[Shape] = []
    while total_bytes < SMALL_BYTES * shape.reads(shards):
        following = shape.merged(shards)
        if shape.merging() + following.reads(shards) >= shape.reads(shards):
            break
        found.append(following)
        shape = following
    return tuple(found)


@dataclass(frozen=True)
class Merge:
    """All that the tasks of a merging need; task `group * ranges + range` writes the file of that number."""

    source: Pile
    shape: Shape
    folder: str

    def __call__(self, number: int) -> int:
        """Write a file, and last where its slices end; returns its number."""
        group, place = divmod(number, self.shape.ranges)
        width = splits.PREFIXES // self.shape.ranges
        fan = self.shape.ranges // self.source.ranges
        groups = range(group * fan, min((group + 1) * fan, self.source.groups))
        events = self.source.users(place * width, (place + 1) * width, groups)
        order = np.argsort(column_numpy(events, "prefix", 0), kind="stable")
        content, ends = sliced(events.take(pa.array(order)), place * width, width, self.shape.slices)
        storage.write_bytes(path_of(self.folder, number, "events"), content)
        storage.write_bytes(path_of(self.folder, number, "ends"), ends.tobytes())
        return number

    def done(self) -> set[int]:
        """Files that an earlier preparation has written already."""
        return numbers_of(self.folder, "ends")

    def result(self) -> Pile:
        """The pile that the tasks made."""
        files = range(self.shape.groups * self.shape.ranges)
        ends = tuple(np.frombuffer(storage.read_bytes(path_of(self.folder, number, "ends")), np.int64) for number in files)
        return Pile(self.folder, self.source.schema, self.shape.groups, self.shape.ranges, self.shape.slices, ends)


def merged(job: Job, pile: Pile, shards: int, execute: Execute) -> Pile:
    """The same events, merged as often as so many shards want it."""
    for number, shape in enumerate(plan(Shape(pile.groups, pile.ranges, pile.slices), pile.bytes, shards), 1):
        task = Merge(pile, shape, job.folder(f"merged-{number}", pile.folder, shape))
        run_tasks(task, shape.groups * shape.ranges, execute, "merged files of events:", before="files have been merged")
        pile = task.result()
    return pile


def sliced(events: pa.Table, first: int, width: int, slices: int) -> tuple[bytes, np.ndarray]:
    """A file of a pile, and where each of its slices ends, int64 [slices].

    Args:
        events: in the order of their column `prefix`, all within [first, first + width).
    """
    edges = np.searchsorted(column_numpy(events, "prefix", 0), first + np.arange(slices + 1) * (width // slices))
    pieces = [to_ipc(events.slice(a, b - a)) if b > a else b"" for a, b in itertools.pairwise(edges.tolist())]
    return b"".join(pieces), np.cumsum([len(piece) for piece in pieces])
