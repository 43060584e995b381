"""Chunks of a history, for each of its beginnings: what a position that sees the first s behaviours divides them into.

SparseCTR (arXiv 2601.17836) cuts a user's history at its |P| - 1 largest gaps. Here (our decision) every position cuts what it
sees itself, so that one rule serves all forms of sequences: of a target it is the paper's, whatever lies behind that target, and
no position knows a later gap. From one beginning to the next a cut may be added, and a smaller one be given up for it, so a chunk
lives from one beginning to another, and all positions together have few of them: about 2 |P| log(n / |P|) where n gaps lie in
random order.
"""

import heapq
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Chunks:
    """The finished chunks of a history of n behaviours, I of them, ordered by when they are `born`."""

    starts: np.ndarray
    """int64 [I]; the first behaviour of each."""
    ends: np.ndarray
    """int64 [I]; the behaviour after its last."""
    born: np.ndarray
    """int64 [I]; a position that sees at least so many behaviours has this chunk ..."""
    died: np.ndarray
    """int64 [I]; ... if it sees fewer than so many."""
    running: np.ndarray
    """int64 [n + 1]; of a position that sees s behaviours the first of the chunk that they end in, which still grows."""


def by_time(times: np.ndarray, most: int) -> Chunks:
    """Cut at the `most` - 1 largest gaps of what is seen; of equal gaps at the earlier (our decision).

    Args:
        times: int64 [n], ascending.
        most: chunks, the running one among them.
    """
    ledger = _Ledger(len(times))
    smallest_first: list[tuple[int, int]] = []
    for place, gap in enumerate(np.diff(times).tolist(), 1):
        if len(smallest_first) < most - 1:
            heapq.heappush(smallest_first, (gap, -place))
        elif smallest_first and gap > smallest_first[0][0]:
            _, given_up = heapq.heapreplace(smallest_first, (gap, -place))
            ledger.merge(-given_up, place + 1)
        else:
            continue
        ledger.cut(place, place + 1)
    return ledger.chunks()


def by_length(count: int, most: int) -> Chunks:
    """Chunks of one length, which doubles when `most` of them are full: 1, 2, 4 .. behaviours (our decision, to compare with).

    Args:
        count: behaviours.
        most: chunks, the running one among them.
    """
    ledger, length = _Ledger(count), 1
    for place in range(1, count):
        if place == length * most:
            length *= 2
            for odd in [cut for cut in ledger.cuts if cut % length]:
                ledger.merge(odd, place + 1)
        if place % length == 0:
            ledger.cut(place, place + 1)
    return ledger.chunks()


class _Ledger:
    """The cuts of the present beginning, and all chunks so far."""

    def __init__(self, count: int) -> None:
        self.cuts: list[int] = []
        """Ascending."""
        self._count = count
        self._rows: list[list[int]] = []
        """Start, end, born, died."""
        self._alive: dict[int, list[int]] = {}
        """By end."""
        self._running = np.zeros(count + 1, np.int64)

    def cut(self, place: int, now: int) -> None:
        """A new latest cut: the chunk before it is finished from the beginning `now` on."""
        self._open(self.cuts[-1] if self.cuts else 0, place, now)
        self.cuts.append(place)
        self._running[now] = place

    def merge(self, cut: int, now: int) -> None:
        """Give up a cut: the chunks on both sides become one."""
        at = bisect_left(self.cuts, cut)
        self._alive.pop(cut)[3] = now
        del self.cuts[at]
        left = self.cuts[at - 1] if at else 0
        if at < len(self.cuts):
            self._alive.pop(self.cuts[at])[3] = now
            self._open(left, self.cuts[at], now)

    def chunks(self) -> Chunks:
        rows = np.array(self._rows, np.int64).reshape(-1, 4)
        return Chunks(*rows.T, running=np.maximum.accumulate(self._running))

    def _open(self, start: int, end: int, now: int) -> None:
        row = [start, end, now, self._count + 1]
        self._rows.append(row)
        self._alive[end] = row
