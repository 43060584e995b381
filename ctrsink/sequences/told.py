"""What is told of behaviours and of targets: categories, buckets and numbers of all sequences at once."""

from collections.abc import Callable

import numpy as np

from ctrsink.dataset.events import Events
from ctrsink.dataset.layout import Layout
from ctrsink.features.buckets import signal_ids
from ctrsink.features.columns import in_table
from ctrsink.features.ragged import Ragged
from ctrsink.features.registry import signal
from ctrsink.sequences.windows import Cuts, Windows

Column = Callable[[Events, np.ndarray], np.ndarray]
"""(events, rows [n]) -> a value of each row, [n, ...]."""


def of_rows(cuts: Cuts, rows: Ragged, column: Column) -> np.ndarray:
    """The column of the rows of all sequences, one behind another."""
    return np.concatenate([column(events, own) for events, own in cuts.each(rows.values, rows.offsets[1:])])


def behaviour_signals(w: Windows, layout: Layout, behaviours: Ragged) -> np.ndarray:
    """Buckets and categories of the behaviours kept, int64 [K, S], by the layout's `signals`."""
    placed = tuple(name for name in layout.signals if signal(name).kind == "bucket")
    buckets = iter(_buckets(w, layout, placed).T) if placed else iter(())
    found = [
        next(buckets) if name in placed else of_rows(w.cuts, behaviours, _category(name, layout.rows)) for name in layout.signals
    ]
    return _stacked(found, len(behaviours.values))


def behaviour_numbers(events: Events, rows: np.ndarray) -> np.ndarray:
    """z-scores told of behaviours, float32 [n, F]."""
    return np.zeros((len(rows), 0), np.float32) if events.numbers is None else events.numbers[rows]


def target_signals(cuts: Cuts, layout: Layout, rows: Ragged) -> np.ndarray:
    """Categories told of targets, int64 [M, C], by the layout's `target_signals`."""
    found = [of_rows(cuts, rows, _category(name, layout.target_rows)) for name in layout.target_signals]
    return _stacked(found, len(rows.values))


def target_numbers(events: Events, rows: np.ndarray) -> np.ndarray:
    """z-scores told of targets, float32 [n, G]."""
    return np.zeros((len(rows), 0), np.float32) if events.target_numbers is None else events.target_numbers[rows]


def base_scores(events: Events, rows: np.ndarray) -> np.ndarray:
    """Logits of the base score, float32 [n]; 0 where the layout has none."""
    return np.zeros(len(rows), np.float32) if events.base is None else events.base[rows]


def _category(name: str, rows: int) -> Column:
    """The row of its table of embeddings, of `rows` where it is hashed, that each event has in the category."""
    if signal(name).hashed:
        return lambda events, own: in_table(events.categories[name][own], rows)
    return lambda events, own: events.categories[name][own]


def _stacked(columns: list[np.ndarray], rows: int) -> np.ndarray:
    return np.stack(columns, axis=1).astype(np.int64) if columns else np.zeros((rows, 0), np.int64)


def _buckets(windows: Windows, layout: Layout, names: tuple[str, ...]) -> np.ndarray:
    """Bucket signals of all behaviours kept, [N, S].

    One event more is read before the window, so that the oldest behaviour knows the gap before it.

    A behaviour that was retrieved has the signals that it has among all of the history.
    """
    lead = (windows.starts > windows.cuts.begins).astype(np.int64)
    lengths = windows.counts - windows.tails + 1 + lead
    times = np.concatenate([events.timestamps[rows] for events, rows in windows.behaviours(lead, target=True)])
    ends = lengths.cumsum()
    wanted = np.ones(len(times), np.bool_)
    wanted[(ends - lengths)[lead > 0]] = False
    similar = None
    if windows.cosines is not None:
        similar = np.full(len(times), np.nan, np.float32)
        similar[wanted] = windows.cosines
    if windows.kept is not None:
        wanted[wanted] = windows.kept
    wanted[ends - 1] = False
    return signal_ids(names, times, layout.buckets, lengths, similar)[wanted]
