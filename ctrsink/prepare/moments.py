"""Last task: how large the signals that are numbers are, over the training range of one shard."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ctrsink import storage
from ctrsink.dataset.arrow import from_parquet
from ctrsink.dataset.manifest import (
    SPLITS,
    VECTOR,
    NeighboursEntry,
    Scale,
    ShardEntry,
    SplitTimes,
    read_file,
    shard_schema,
    tokens_schema,
)
from ctrsink.dataset.shard import Knowing, read_neighbours
from ctrsink.dataset.splits import split_of
from ctrsink.features.neighbours import Neighbours
from ctrsink.features.numbers import number
from ctrsink.prepare.results import numbers_of, path_of


@dataclass(frozen=True)
class Moments:
    """All that the last tasks need."""

    folder: str
    to: str
    """The data set, whose shards are written already."""
    shards: tuple[ShardEntry, ...]
    knowing: Knowing
    """Without neighbours, which are read where the task runs."""
    neighbours: NeighboursEntry | None
    text_line: tuple[float, float] | None
    """See Manifest."""
    split_times: SplitTimes
    names: tuple[str, ...]
    """Of the numbers."""

    def __call__(self, shard: int) -> int:
        """Write the count, sum and sum of squares of each number; returns the shard's number."""
        events, tokens = (
            from_parquet(storage.read_bytes(storage.join(self.to, file.path)), columns)
            for file, columns in (
                (self.shards[shard].events_file, shard_schema(self.knowing.columns).names),
                (
                    self.shards[shard].tokens_file,
                    [*tokens_schema(self.knowing.columns, None).names, *([VECTOR] if self.text_line else [])],
                ),
            )
        )
        entry = self.neighbours
        table = _table(self.to, entry.model_dump_json(), self.text_line) if entry else None
        histories = replace(self.knowing, neighbours=table).histories(events, tokens)
        trained = (split_of(histories.timestamps, self.split_times) == SPLITS.index("train")) & (histories.labels >= 0)
        found: dict[str, list[float]] = {}
        for name in self.names:
            values = number(name, histories)[trained]
            values = values[np.isfinite(values)]
            found[name] = [len(values), float(values.sum()), float(np.square(values).sum())]
        storage.write_bytes(path_of(self.folder, shard, "moments"), json.dumps(found).encode())
        return shard

    def done(self) -> set[int]:
        return numbers_of(self.folder, "moments")

    def scales(self) -> dict[str, Scale]:
        """Mean and deviation of each number, once all tasks are done."""
        found = (json.loads(storage.read_bytes(path_of(self.folder, n, "moments"))) for n in range(len(self.shards)))
        return scales_of(self.names, found)


def scales_of(names: Iterable[str], moments: Iterable[dict[str, list[float]]]) -> dict[str, Scale]:
    """From counts, sums and sums of squares; a number that is never known has mean 0 and deviation 1."""
    sums = {name: np.zeros(3) for name in names}
    for found in moments:
        for name, three in found.items():
            sums[name] += three
    out = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count if count else 0.0
        variance = max(squares / count - mean**2, 0.0) if count else 1.0
        out[name] = Scale(mean=float(mean), deviation=float(variance**0.5))
    return out


@lru_cache(maxsize=1)
def _table(to: str, said: str, line: tuple[float, float] | None) -> Neighbours:
    entry = NeighboursEntry.model_validate_json(said)
    return read_neighbours(read_file(to, entry.file), entry.variance, entry.shrink, line)
