"""Sequences that a run cannot use are found before a worker starts, in just those shards whose counts make them possible."""

from collections.abc import Sequence

import numpy as np

from ctrsink.config import RunSpec
from ctrsink.dataset.cache import Cache
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.manifest import Manifest, ShardEntry, Split
from ctrsink.dataset.reader import Dataset
from ctrsink.families.registry import source_of
from ctrsink.stream.stream import BUILT_AT_ONCE


def foreseen(run: RunSpec, layout: Layout, manifest: Manifest, limit: int | None) -> int | None:
    """Build the sequences of a run that may be wrong; positions of the first that has more than `limit`, None where none has.

    Args:
        limit: of families whose sequences are text; None for any number.

    Raises:
        InputError: a sequence would show an impression the answers of its own request.
    """
    shards = suspects(manifest, layout, limit)
    if not shards:
        return None
    dataset = Dataset(run.data.uri, 2, Cache.of(run.data.cache))
    measured = run.evaluate.splits if run.evaluate.max_sequences is None else ()
    return longer_than(limit, dataset, layout, sorted({"train", *measured}), shards)


def suspects(manifest: Manifest, layout: Layout, limit: int | None) -> list[int]:
    """Numbers of the shards that may hold a sequence of more than `limit` positions, or one that shows a request its answers."""
    shared = layout.examples == "per_user" and layout.targets > 1

    def suspect(shard: ShardEntry) -> bool:
        return (shared and bool(shard.shared)) or (limit is not None and most_positions(manifest, layout, shard) > limit)

    return [number for number, shard in enumerate(manifest.shards) if suspect(shard)]


def most_positions(manifest: Manifest, layout: Layout, shard: ShardEntry) -> int:
    """No sequence of the shard has more positions; 0 where the data set is too old to tell."""
    if shard.longest is None:
        return 0
    power = len(shard.longest) - 1
    events = spoken = 2**power  # spoken: those with a text
    if layout.examples != "per_user":  # between the targets of a per_user sequence any number of events may lie
        events = min(events, layout.history + 1)
        spoken = events if layout.text_history is None else min(events, layout.text_history + 1)
        power = min(power, (spoken - 1).bit_length())
    # What the others of its request answered may lie between a target and its history.
    tokens = shard.longest[power] + (shard.longest[0] if shard.shared else 0)
    if layout.retrieve is not None:
        events = min(events, layout.retrieve + 1)
        spoken = min(events, spoken)
        tokens = min(tokens, spoken * shard.longest[0])
    feedback = max(map(len, manifest.feedback_tokens), default=0)
    return len(manifest.prefix_tokens) + tokens + spoken * feedback + events * layout.sinks


def longer_than(limit: int | None, dataset: Dataset, layout: Layout, splits: Sequence[Split], shards: list[int]) -> int | None:
    """Build the sequences of some shards; positions of the first that has more than `limit`, None where there is none.

    Args:
        limit: None for any number.
        splits: of all but train only the newest part is looked at.

    Raises:
        InputError: a sequence cannot be built, see Family.encode.
    """
    for split in splits:
        source = source_of(dataset, split, layout, newest=split != "train")
        ends = np.cumsum(source.per_shard)
        for number in shards:
            for first in range(ends[number] - source.per_shard[number], ends[number], BUILT_AT_ONCE):
                found = source.sequences(np.arange(first, min(first + BUILT_AT_ONCE, ends[number])))
                if limit is not None and (longest := int(found.columns["position_ids"].max()) + 1) > limit:
                    return longest
    return None
