"""Pairs of a sequence: what is similar to what, and how many tokens see how many."""

import numpy as np

from ctrsink.attention.kinds import PREFIX, SINK
from ctrsink.dataset.layout import Layout
from ctrsink.features.ragged import Ragged, ranges
from ctrsink.features.similarity import cosines
from ctrsink.sequences.windows import Cuts


def similarity_pairs(cuts: Cuts, layout: Layout, asks: Ragged, behaviours: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """Of each event asked and each sink of its sequence, float32 [sum of m * k], 0 where it is not known then; and the bounds of
    each sequence in it. Empty where the layout has no similarity.
    """
    if layout.similarity is None:
        return np.empty(0, np.float32), np.zeros(len(asks.offsets), np.int64)
    owner = np.arange(len(asks.offsets) - 1).repeat(np.diff(asks.offsets))
    sinks = behaviours.lengths(owner)
    bounds = np.append(0, sinks.cumsum())[asks.offsets]
    asked = asks.values.repeat(sinks)
    seen = behaviours.values[ranges(behaviours.offsets[owner], sinks)]
    out = np.zeros(len(asked), np.float32)
    stop = 0
    for (events, own_asked), (_, own_seen) in zip(cuts.each(asked, bounds[1:]), cuts.each(seen, bounds[1:]), strict=True):
        start, stop = stop, stop + len(own_asked)
        before = np.flatnonzero(own_seen < own_asked)
        if layout.similarity == "vectors":
            assert events.vectors is not None
            found = cosines(events.vectors, events.texts[own_asked[before]], events.texts[own_seen[before]])
            out[start + before] = np.nan_to_num(found, nan=0.0)
        else:
            assert events.histories is not None
            found, values = events.histories.similar(own_asked[before], own_seen[before])
            out[start + before[found]] = values
    return out, bounds


def visible_pairs(
    kinds: np.ndarray, events: np.ndarray, aligned: np.ndarray, candidate: np.ndarray, bounds: np.ndarray, window: int | None
) -> dict[str, np.ndarray]:
    """How many tokens all tokens of each sequence see, by name int64 [n]: `pairs`, and `pairs_through_sinks` where targets see
    sinks alone. The sum of `ctrsink.attention.rule_dense.visible`, counted without making it, in O(N).

    Args:
        kinds, events, aligned, candidate: [N], see Packed.
        bounds: int64 [n + 1]; where each sequence begins and ends.
    """
    lengths = np.diff(bounds)
    owner = np.arange(len(lengths)).repeat(lengths)
    # A number of each event that ascends over all sequences.
    number = owner * (int(events.max(initial=0)) + 2) + events
    own = np.searchsorted(number, number)  # where the token's own event begins
    prefix = kinds == PREFIX
    shown, through = _before(~candidate), _before(prefix | (kinds == SINK))
    columns, begin = np.arange(len(kinds)), bounds[:-1].repeat(lengths)
    place = places(events, candidate, bounds)
    found = {}
    for name, sinks_only in (("pairs", False), ("pairs_through_sinks", True)):

        def earlier(index: np.ndarray, sinks_only: bool = sinks_only) -> np.ndarray:
            """How many tokens of the sequence before `index` may be seen from other events."""
            every = shown[index] - shown[begin]
            return np.where(aligned, through[index] - through[begin], every) if sinks_only else every

        seen = columns - own + 1 + earlier(own)
        if window is not None:
            number_of_place = owner * (int(events.max(initial=0)) + 2) + np.maximum(place - window, 0)
            oldest = np.searchsorted(owner * (int(events.max(initial=0)) + 2) + place, number_of_place)
            seen = seen - np.where(
                oldest > begin, earlier(oldest) - np.add.reduceat(prefix, bounds[:-1], dtype=np.int64)[owner], 0
            )
        found[name] = np.add.reduceat(seen, bounds[:-1])
    return found


def places(events: np.ndarray, candidate: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """What a window counts, [N]; see rule_dense.places."""
    first = np.minimum.reduceat(np.where(candidate, events, np.iinfo(events.dtype).max), bounds[:-1])
    return np.where(candidate, first.repeat(np.diff(bounds)), events)


def _before(marked: np.ndarray) -> np.ndarray:
    """bool [N] -> how many are marked before each position and in all, int64 [N + 1]."""
    return np.append(0, marked.cumsum())
