"""Sequences without text: a row for each behaviour, oldest first, and a row for each target, for models of ids and signals."""

import numpy as np

from ctrsink.dataset.layout import Layout
from ctrsink.sequences import told
from ctrsink.sequences.columns import TARGETS, Sequences
from ctrsink.sequences.windows import Cuts, windows_of

BEHAVIOURS = "behaviours"


def encode(cuts: Cuts, layout: Layout) -> Sequences:
    """The sequences in their order, each with `layout.history` behaviours before its first target at most.

    Columns of behaviours: `signals` int64 [K, S], `numbers` float32 [K, F], `behaviour_times` int64 [K]. Of targets:
    `target_signals` int64 [T, C], `target_numbers` float32 [T, G], `base` float32 [T], and `seen` int64 [T]: a target may see the
    first so many behaviours of its sequence and no other; the cost `pairs` is their sum. In a `per_user` sequence a target is a
    behaviour of those after it.

    Raises:
        InputError: a `per_user` sequence would show an impression the answers of its own request.
    """
    w, targets = windows_of(cuts, layout), cuts.targets
    behaviours = w.behaviour_rows()
    kept = np.diff(behaviours.offsets)
    counts = np.diff(targets.offsets)
    # Targets of one moment see the whole history; of others each sees what lies before it.
    before = targets.values - w.starts.repeat(counts)
    seen = np.where(w.together.repeat(counts), kept.repeat(counts), before)
    columns = {
        "signals": told.behaviour_signals(w, layout, behaviours),
        "numbers": told.of_rows(cuts, behaviours, told.behaviour_numbers),
        "behaviour_times": told.of_rows(cuts, behaviours, lambda events, rows: events.timestamps[rows]),
        "target_signals": told.target_signals(cuts, layout, targets),
        "target_numbers": cuts.of_targets(told.target_numbers),
        "base": cuts.of_targets(told.base_scores),
        "seen": seen,
        "labels": cuts.of_targets(lambda events, rows: events.labels[rows]).astype(np.float32),
        "events": targets.values - cuts.begins.repeat(counts),
        "times": cuts.of_targets(lambda events, rows: events.timestamps[rows]),
    }
    of_behaviours = ("signals", "numbers", "behaviour_times")
    return Sequences(
        columns,
        {name: BEHAVIOURS if name in of_behaviours else TARGETS for name in columns},
        {BEHAVIOURS: behaviours.offsets, TARGETS: targets.offsets, "rows": behaviours.offsets + targets.offsets},
        counts="rows",
        costs={"pairs": np.add.reduceat(seen, targets.offsets[:-1])},
    )
