"""What a run takes of a node's memory and of its storage, beside the devices."""

import dataclasses
from typing import Any

import numpy as np

from ctrsink import storage
from ctrsink.config import RunSpec
from ctrsink.dataset.reader import Dataset
from ctrsink.estimate.held import MASTER, MOMENTS
from ctrsink.estimate.weights import Weights

PROCESS = 0.6 * 2**30
"""Resident bytes of a worker with torch, DeepSpeed and Ray, before it has a model: about that here, on a CPU."""

AT_ONCE = 2**30
"""Bytes of a checkpoint under ZeRO-3 that the first rank gathers to its memory, to write them while training goes on."""


def host_memory(
    spec: RunSpec, dataset: Dataset, shard: float, weights: Weights, offloaded: int, processes: int, world: int, on_device: bool
) -> dict[str, float]:
    """Bytes of the node that the first worker is on, by part.

    Args:
        shard: bytes of a shard in memory.
        offloaded: bytes that the engine of each worker keeps in the host's memory.
        processes: workers of the node.
        world: workers of all nodes.
        on_device: models are computed elsewhere than in the host's memory.
    """
    readers = processes * max(1, spec.data.workers)
    held = min(2 * spec.data.shuffle_shards, len(dataset.manifest.shards))
    found = {
        "processes": PROCESS * processes,
        "index": float(nbytes(dataset.index)),  # a mapped file, which the processes of a node share
        "shards": shard * held * readers,
        "checkpoint": float(_checkpoint(spec, weights)),
    }
    if offloaded:
        found["offloaded"] = float(offloaded * processes)
    if on_device:  # made in the host's memory: under ZeRO-3 each its share, and one weight whole; else each the whole model
        sharded = weights.bytes / world + weights.largest_bytes
        found["building"] = float((sharded if spec.train.zero_stage == 3 else weights.bytes) * processes)
    return found


def _checkpoint(spec: RunSpec, weights: Weights) -> int:
    """What the first worker holds of a checkpoint: a copy, and of the moments a second one as the file's bytes, or one tensor."""
    if spec.train.zero_stage == 3 and (MASTER + MOMENTS) * weights.trained > AT_ONCE:
        return 2 * weights.largest_bytes
    return (MASTER + 2 * MOMENTS) * weights.trained


def data_bytes(spec: RunSpec, dataset: Dataset) -> int:
    """Bytes of all shards, in files."""
    return sum(entry.events_file.bytes + entry.tokens_file.bytes for entry in dataset.manifest.shards)


def read_in_epoch(spec: RunSpec, dataset: Dataset, processes: int) -> int:
    """Bytes that a node reads from the storage in an epoch: every worker needs every shard, and a cache serves all of a node.

    From the second epoch on a cache that holds the data set reads nothing.
    """
    cached = storage.is_remote(spec.data.uri) and spec.data.cache.limit_mib * 2**20 >= data_bytes(spec, dataset)
    return data_bytes(spec, dataset) * (1 if cached else processes)


def nbytes(value: Any) -> int:
    """Bytes of all arrays in dataclasses, mappings and lists, each counted once."""
    seen: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, np.ndarray):
            whole = value if value.base is None or not isinstance(value.base, np.ndarray) else value.base
            seen[id(whole)] = whole.nbytes
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                look(getattr(value, field.name, None))
        elif isinstance(value, dict):
            for inner in value.values():
                look(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                look(inner)

    look(value)
    return sum(seen.values())
