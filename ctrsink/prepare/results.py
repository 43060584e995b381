"""Where the results of tasks lie: a file per task and kind of result, and tables of all items, named by what they hold."""

import hashlib
from functools import lru_cache

import pyarrow as pa

from ctrsink import storage
from ctrsink.config.data import CacheSpec
from ctrsink.dataset.arrow import write_ipc
from ctrsink.dataset.cache import Cache


def path_of(folder: str, number: int, kind: str) -> str:
    """The file of one kind of result of task `number`."""
    return storage.join(folder, f"{number:06d}.{kind}")


def numbers_of(folder: str, kind: str) -> set[int]:
    """Tasks that have a result of that kind."""
    return {int(name.removesuffix(f".{kind}")) for name in storage.list_files(folder) if name.endswith(f".{kind}")}


def write_named(folder: str, name: str, table: pa.Table) -> str:
    """Write a table that all tasks read, not packed, so that it can be mapped; returns the file, named by its content.

    It is made bytes twice, for the name and for the file, because memory never holds these bytes at once.
    """
    digest = hashlib.sha256()
    write_ipc(table, digest.update)
    path = storage.join(folder, f"{name}-{digest.hexdigest()[:16]}.arrow")
    with storage.writing(path) as write:
        write_ipc(table, write)
    return path


@lru_cache(maxsize=32)
def read_named(path: str) -> pa.Table:
    """What write_named wrote, mapped and not held: the processes of a host share its pages.

    A file on S3 is mapped from the host's cache; where there is none that serves, the process holds the table.
    """
    if not storage.is_remote(path):
        return pa.ipc.open_stream(pa.memory_map(str(storage.local_path(path)))).read_all()
    key = storage.sha256(f"table of a preparation {path.rpartition('/')[2]}".encode())
    found = Cache.of(CacheSpec()).mapped(key, storage.info(path).bytes, lambda: [storage.read_bytes(path)])
    return pa.ipc.open_stream(pa.py_buffer(storage.read_bytes(path) if found is None else found)).read_all()


def column_of(path: str, name: str) -> pa.Array | pa.ChunkedArray:
    """A column of such a table; texts of more than 2 GiB are in several chunks."""
    column = read_named(path).column(name)
    return column.chunk(0) if column.num_chunks == 1 else column
