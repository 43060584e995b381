"""The floor under every model: how an item was liked so far, smoothed."""

import numpy as np

from ctrsink.dataset.reader import Dataset
from ctrsink.evaluate.predictions import Predictions


def smoothed_item_mean(dataset: Dataset, split: str, strength: float = 5.0) -> Predictions:
    """Share of positives among an item's training impressions, drawn to the overall share by `strength` imagined impressions.

    Training impressions are those of all parts of the data set; predicted is what models are measured on, its newest part.
    """
    positives = np.zeros(dataset.manifest.item_count)
    counts = np.zeros(dataset.manifest.item_count)
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for user in range(len(dataset.index["row"])):
        shard, row = dataset.locate(user)
        labels = shard.chronology(row).labels
        items = shard.items[shard.offsets[row] : shard.offsets[row + 1]]
        lo, hi = dataset.events("train", user)
        seen = lo + np.flatnonzero(labels[lo:hi] >= 0)
        np.add.at(counts, items[seen], 1)
        np.add.at(positives, items[seen], labels[seen])
        if dataset.index["shard"][user] not in dataset.newest:
            continue
        lo, hi = dataset.events(split, user)
        asked = lo + np.flatnonzero(labels[lo:hi] >= 0)
        rows.append((np.full(len(asked), user), asked, labels[asked], items[asked]))
    users, events, labels, items = (np.concatenate(column) for column in zip(*rows, strict=True))
    overall = positives.sum() / counts.sum()
    return Predictions(users, events, labels, (positives[items] + strength * overall) / (counts[items] + strength))
