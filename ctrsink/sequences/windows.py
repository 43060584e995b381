"""Where sequences are cut: which events of which chronology each of them takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ctrsink.dataset.events import Events
from ctrsink.dataset.layout import Layout
from ctrsink.errors import InputError
from ctrsink.features.ragged import Ragged, ranges
from ctrsink.features.similarity import cosines, most_similar


@dataclass(frozen=True)
class Cuts:
    """Where n sequences are cut: `sizes[i]` of them from `events[i]`, whose rows they name."""

    events: list[Events]
    sizes: np.ndarray
    begins: np.ndarray
    """int64 [n]; row at which each sequence's chronology begins."""
    targets: Ragged
    """Rows of the targets of each sequence, ascending, at least one."""

    def each(self, rows: np.ndarray, ends: np.ndarray) -> Iterator[tuple[Events, np.ndarray]]:
        """The events and those of the `rows` that point there; `ends` [n] says where each sequence's rows end."""
        stops = ends[self.sizes.cumsum() - 1].tolist()
        for events, start, stop in zip(self.events, [0, *stops], stops, strict=False):
            yield events, rows[start:stop]

    def of_targets(self, column: Callable[[Events, np.ndarray], np.ndarray]) -> np.ndarray:
        """`column(events, rows)` of all targets."""
        return np.concatenate([column(events, rows) for events, rows in self.each(self.targets.values, self.targets.offsets[1:])])


def split_requests(cuts: Cuts) -> tuple[Cuts, np.ndarray]:
    """Cut each piece of n into its requests: impressions that were shown at one moment behind one history.

    Returns:
        The cuts of m >= n sequences, in the order of the pieces, and int64 [m], which piece each is of.
    """
    rows, ends = cuts.targets.values, cuts.targets.offsets[1:]
    known = cuts.of_targets(lambda events, own: events.known[own])
    times = cuts.of_targets(lambda events, own: events.timestamps[own])
    piece = np.arange(len(ends)).repeat(np.diff(cuts.targets.offsets))
    opens = np.ones(len(rows), np.bool_)
    opens[1:] = (np.diff(known) != 0) | (np.diff(times) != 0) | (np.diff(piece) != 0)
    firsts = np.flatnonzero(opens)
    owner = piece[firsts]
    bounds = np.searchsorted(owner, np.append(0, cuts.sizes.cumsum()))
    return Cuts(cuts.events, np.diff(bounds), cuts.begins[owner], Ragged(rows, np.append(firsts, len(rows)))), owner


@dataclass(frozen=True)
class Windows:
    """Which rows each of n sequences takes: `counts - tails` from `starts` on, then its last `tails` targets; those `kept`."""

    cuts: Cuts
    starts: np.ndarray
    counts: np.ndarray
    together: np.ndarray
    """bool [n]; the targets were shown at one moment: all are tails. Else the last alone is, and the others lie before it."""
    cosines: np.ndarray | None = None
    """[sum of counts], of each row with the last of its sequence; where the layout needs them."""
    kept: np.ndarray | None = None
    """bool [sum of counts]; None: all."""

    @property
    def tails(self) -> np.ndarray:
        return np.where(self.together, np.diff(self.cuts.targets.offsets), 1)

    @property
    def sizes(self) -> np.ndarray:
        """Rows that each sequence keeps, its last target among them."""
        return (
            self.counts if self.kept is None else np.add.reduceat(self.kept, self.counts.cumsum() - self.counts, dtype=np.int64)
        )

    def chosen(self) -> Iterator[tuple[Events, np.ndarray]]:
        """The events and those of the rows kept that point there."""
        if self.kept is None:
            return self.each()
        return self.cuts.each(np.concatenate([rows for _, rows in self.each()])[self.kept], self.sizes.cumsum())

    def each(self, lead: np.ndarray | int = 0) -> Iterator[tuple[Events, np.ndarray]]:
        """The events and those of all rows that point there, kept or not, with `lead` more before each sequence's first."""
        counts = self.counts + lead
        ends = counts.cumsum()
        rows = ranges(self.starts - lead, counts)
        rows[ranges(ends - self.tails, self.tails)] = self._tail_rows()
        return self.cuts.each(rows, ends)

    def behaviours(self, lead: np.ndarray, target: bool) -> Iterator[tuple[Events, np.ndarray]]:
        """As `each`, without the tails but, if asked for, the first."""
        counts = self.counts - self.tails + lead + int(target)
        ends = counts.cumsum()
        rows = ranges(self.starts - lead, counts)
        if target:
            rows[ends - 1] = self._tail_rows()[self.tails.cumsum() - self.tails]
        return self.cuts.each(rows, ends)

    def behaviour_rows(self) -> Ragged:
        """Rows of the behaviours kept, which have a sink each, by sequence; the rows are those of the sequence's events."""
        rows = np.concatenate([rows for _, rows in self.chosen()])
        wanted = np.ones(len(rows), np.bool_)
        wanted[ranges(self.sizes.cumsum() - self.tails, self.tails)] = False
        return Ragged(rows[wanted], np.append(0, (self.sizes - self.tails).cumsum()))

    def _tail_rows(self) -> np.ndarray:
        ends = self.cuts.targets.offsets[1:]
        return self.cuts.targets.values[ranges(ends - self.tails, self.tails)]


def windows_of(cuts: Cuts, layout: Layout) -> Windows:
    """The rows that each sequence takes.

    Raises:
        InputError: a `per_user` sequence would show an impression the answers of its own request.
    """
    rows, offsets = cuts.targets.values, cuts.targets.offsets
    firsts, ends = offsets[:-1], offsets[1:]
    counts = ends - firsts
    known = cuts.of_targets(lambda events, own: events.known[own]) + cuts.begins.repeat(counts)
    together = np.logical_and.reduceat(known == known[firsts].repeat(counts), firsts)
    if (~together.repeat(counts) & (known < rows)).any():
        raise InputError(
            "impressions of one request share a history, which per_user sequences cannot keep apart: "
            "use data.examples per_request or per_target, or prepare the log without its request column"
        )
    # One target: what was known when its request was made, then the target. Several: everything from the first to the last.
    past = known[firsts]
    starts = np.maximum(cuts.begins, past - layout.history)
    windows = Windows(cuts, starts, np.where(together, past + counts, rows[ends - 1] + 1) - starts, together)
    if not layout.depends_on_target:
        return windows
    by_vectors = "similarity" in layout.signals or layout.retrieve_by == "vectors"
    similar = _with_targets(windows, _cosines) if by_vectors else None
    if layout.retrieve is None:
        return replace(windows, cosines=similar)
    wanted = similar if similar is not None and layout.retrieve_by == "vectors" else _with_targets(windows, _by_neighbours)
    return replace(windows, cosines=similar, kept=most_similar(wanted, windows.counts, layout.retrieve))


def _with_targets(windows: Windows, similar: Callable[[Events, np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """How `similar` the items of all rows are to that of their sequence's target, [sum of counts]."""
    targets = windows.cuts.each(windows.cuts.targets.values.repeat(windows.counts), windows.counts.cumsum())
    found = [similar(events, rows, lasts) for (events, rows), (_, lasts) in zip(windows.each(), targets, strict=True)]
    return np.concatenate(found)


def _cosines(events: Events, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    assert events.vectors is not None
    return cosines(events.vectors, events.texts[rows], events.texts[targets])


def _by_neighbours(events: Events, rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float64 [N]; 0 where nothing is known of a pair, as in the similarity bias; the same item comes before all."""
    h = events.histories
    assert h is not None and h.items is not None
    out = np.where((h.items[rows] == h.items[targets]) & (h.items[rows] >= 0), np.inf, 0.0)
    found, values = h.similar(targets, rows)
    out[found] = values
    return out
