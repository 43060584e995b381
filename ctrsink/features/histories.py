"""Events of any number of users as signals see them: what was known of user and item when each event was asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ctrsink.features.neighbours import Neighbours
from ctrsink.features.ragged import Ragged, ranges
from ctrsink.features.similarity import cosines

DRAWN_TO_ZERO = 5.0  # imagined events without deviation, of a user's mean deviation
_PAIRS = 4_000_000  # of an event and one before it, held at a time


@dataclass(frozen=True)
class Alike:
    """Sums over the events j of each event's window, weighted by the similarity s of their items to its own, float64 [N] each."""

    opinion: np.ndarray
    """Of `s d`, d the deviation beyond the user's own."""
    positive: np.ndarray
    """Of s where the label is 1."""
    weight: np.ndarray
    """Of |s|."""


@dataclass(frozen=True)
class Histories:
    """N events, user after user, oldest first in each. An event's own outcome is known after it only."""

    begins: np.ndarray
    """int64 [N]; row at which the chronology of the event's user begins."""
    known: np.ndarray
    """int64 [N]; how many of the user's events were known when this one was asked: those before its request."""
    timestamps: np.ndarray
    """int64 [N], seconds since 1970."""
    outcome: np.ndarray
    """float64 [N]; the feedback, or the label where the log has no feedback; NaN where there was none."""
    labels: np.ndarray
    """int8 [N]; 0, 1, or -1 where the event is no impression."""
    item_mean: np.ndarray
    """float64 [N]; smoothed mean outcome of the item as of the last full period before; NaN where nothing was known at all."""
    item_count: np.ndarray
    """float64 [N]; outcomes that the mean is of."""
    items: np.ndarray | None = None
    """int64 [N]; row of the item table, -1 where it is unknown; needed with `neighbours`."""
    counted: np.ndarray | None = None
    """bool [N]; whether the event is among those that the table of neighbours counts."""
    inside: np.ndarray | None = None
    """bool [N]; whether it lies in the range of time that these are of."""
    fields: Ragged | None = None
    """Values that the item of each event has in its fields, as numbers; N rows."""
    neighbours: Neighbours | None = None
    vectors: np.ndarray | None = None
    """float16 [R, width], of the texts of items, where `neighbours` go by these, too."""
    texts: np.ndarray | None = None
    """int64 [N]; row of these."""
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By signal (see features.columns), [N] each: numbers, float64, NaN where unknown; or hashes, int64, -1 where unknown."""
    users: np.ndarray | None = None
    """int64 [N]; hash of the id of each event's user, -1 where it is unknown."""
    window: int = 200
    """A user's latest events that their statistics are of; `beyond_user` of one of these is of as many before it."""

    @cached_property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The window of each event: its user's events [first, end) that their statistics are of."""
        end = self.begins + self.known
        return np.maximum(self.begins, end - self.window), end

    @cached_property
    def has(self) -> np.ndarray:
        """bool [N]; both the outcome and the item's mean are known."""
        return np.isfinite(self.outcome) & np.isfinite(self.item_mean)

    @cached_property
    def deviation(self) -> np.ndarray:
        """Outcome minus the item's mean then, float64 [N]; 0 where one of them is unknown."""
        return np.where(self.has, self.outcome - self.item_mean, 0.0)

    @cached_property
    def user_res(self) -> np.ndarray:
        """The user's mean deviation before each event, drawn to 0, float64 [N]."""
        return self.total(self.deviation) / (self.total(self.has) + DRAWN_TO_ZERO)

    @cached_property
    def beyond_user(self) -> np.ndarray:
        """The deviation beyond the user's own, float64 [N]; 0 where it is unknown."""
        return np.where(self.has, self.deviation - self.user_res, 0.0)

    @cached_property
    def own(self) -> tuple[np.ndarray, np.ndarray]:
        """Of events in the table's range: what the user put into its sums for the item, float64 [N], and whether anything, bool.

        A user may have met an item several times: the sums hold all counted meetings together, and any meeting knows them.
        """
        assert self.items is not None and self.counted is not None and self.inside is not None
        keys = self.begins * (self.items.max(initial=0) + 2) + self.items + 1
        rows = np.flatnonzero(self.counted)
        known, which = np.unique(keys[rows], return_inverse=True)
        if not len(known):
            return np.zeros(len(keys)), np.zeros(len(keys), np.bool_)
        sums = np.bincount(which, self.beyond_user[rows])
        places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        has = self.inside & (known[places] == keys)
        return np.where(has, sums[places], 0.0), has

    def total(self, values: np.ndarray, latest: int | None = None) -> np.ndarray:
        """Sum of `values` [N] over the `latest` events in each event's window, or all of them, float64 [N]."""
        sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        first, end = self.rows
        return sums[end] - sums[first if latest is None else np.maximum(first, end - latest)]

    @cached_property
    def alike(self) -> Alike:
        """What the user met before that is like each event's item."""
        assert self.items is not None
        assert self.neighbours is not None
        first, end = self.rows
        counts = end - first if self.neighbours.by_text else np.where(self.items >= 0, end - first, 0)
        sums = np.zeros((3, len(self.begins)))
        asked = np.flatnonzero(counts)
        cuts = np.searchsorted(np.cumsum(counts[asked]), np.arange(_PAIRS, counts.sum(), _PAIRS))
        for part in np.split(asked, cuts):
            rows, event = ranges(first[part], counts[part]), part.repeat(counts[part])
            found, weights = self.similar(event, rows)
            rows, event = rows[found], event[found]
            if len(found):
                starts = np.flatnonzero(np.diff(event, prepend=-1))
                weighted = (self.beyond_user[rows] * weights, (self.labels[rows] > 0) * weights, np.abs(weights))
                for place, values in enumerate(weighted):
                    sums[place, event[starts]] = np.add.reduceat(values, starts)
        return Alike(*sums)

    def similar(self, asked: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Similarity of the items of two events of one user each, without that user's own part.

        Args:
            asked, seen: rows of the events [P].

        Returns:
            Which of the pairs are known, ascending int64 [F], and their similarity, float64 [F]. That of the others is 0.
        """
        assert self.neighbours is not None and self.items is not None
        pairs = asked, seen
        found, places = self.neighbours.find(self.items[asked], self.items[seen])
        asked, seen = asked[found], seen[found]
        own, has = self.own
        both = has[asked] & has[seen]
        own = np.where(both, own[asked] * own[seen], 0.0)
        return self._with_texts(pairs, found, self.neighbours.similarity(places, own, both))

    def _with_texts(
        self, pairs: tuple[np.ndarray, np.ndarray], found: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is `found` in the table, and of pairs of an item without a partner what their texts say."""
        assert self.neighbours is not None and self.items is not None
        if (line := self.neighbours.by_text) is None:
            return found, values
        assert self.vectors is not None and self.texts is not None
        rest = np.flatnonzero(self.neighbours.alone(self.items[pairs[0]]) | self.neighbours.alone(self.items[pairs[1]]))
        cosine = cosines(self.vectors, self.texts[pairs[0][rest]], self.texts[pairs[1][rest]])
        known = ~np.isnan(cosine)
        every = np.concatenate([found, rest[known]])
        order = np.argsort(every)
        return every[order], np.concatenate([values, line.of(cosine[known])])[order]
