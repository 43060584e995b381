"""The counts of every user: a few bytes each, of which a host keeps one copy for all of its processes."""

from collections.abc import Callable, Iterator

import numpy as np

from ctrsink import storage
from ctrsink.dataset.arrow import from_parquet
from ctrsink.dataset.cache import Cache
from ctrsink.dataset.manifest import INDEX_SCHEMA, Manifest

_FORM = "index of users, columns of int32, 1"


def read_index(manifest: Manifest, read: Callable[[], bytes], cache: Cache | None) -> dict[str, np.ndarray]:
    """The columns of the index, int32 [users] each: read-only and mapped from the cache's disk, or in memory without a cache.

    Args:
        read: gives the content of its file, checked.

    Raises:
        InputError: the file is missing or damaged.
    """
    names, users = INDEX_SCHEMA.names, sum(shard.users for shard in manifest.shards)
    size = 4 * len(names) * users
    if cache is not None:
        key = storage.sha256(f"{_FORM} {manifest.index.sha256}".encode())
        found = cache.mapped(key, size, lambda: _columns(read(), names))
        if found is not None:
            return dict(zip(names, found.view(np.int32).reshape(len(names), users), strict=True))
    table = from_parquet(read())
    return {name: table[name].to_numpy() for name in table.column_names}


def _columns(content: bytes, names: list[str]) -> Iterator[memoryview]:
    """One after another, so that no more than one is held."""
    return (np.ascontiguousarray(from_parquet(content, [name])[name].to_numpy(), "<i4").data.cast("B") for name in names)
