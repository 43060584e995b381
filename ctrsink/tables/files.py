"""Tables on disk: files of whole stretches of rows, which any number of ranks can read whatever number wrote them.

`<table>/<first row>-<row behind the last>-of-<rows of the table>.safetensors`, each with `values` [n, D] and `squares` [n]. A
file is small enough to be held in memory beside the table, so it is written and checked as a whole. Which files of a folder make
up a checkpoint is the caller's to remember: those of an interrupted save, by another number of ranks, may lie beside them.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save

from ctrsink import storage
from ctrsink.dist import Topology
from ctrsink.errors import InputError
from ctrsink.tables.shares import Share, share
from ctrsink.tables.table import RowTable

FILE_BYTES = 64 * 2**20
_NAME = re.compile(r"(\d+)-(\d+)-of-(\d+)\.safetensors")


class DamagedTable(InputError):
    """A file of a table is missing or is not what was written; an outage of the storage is not this."""


def save_tables(tables: Mapping[str, RowTable], folder: str) -> dict[str, dict[str, Any]]:
    """Write the rows that lie on this rank; returns size and sha256 of each file by its path below `folder`.

    No collective: the tables are saved when all ranks have written, and are then all files of all ranks.

    Args:
        tables: by name.
        folder: local or on S3; files of an earlier attempt are replaced.
    """
    entries = {}
    for name, table in tables.items():
        at_once = max(1, FILE_BYTES // (4 * (table.width + 1)))
        own, values, squares = table.own, table.values, table.squares
        for first in range(own.start, own.stop, at_once):
            last = min(first + at_once, own.stop)
            here = slice(first - own.start, last - own.start)
            content = save({"values": values[here].cpu(), "squares": squares[here].cpu()})
            path = f"{folder_of(name)}/{first:010d}-{last:010d}-of-{table.rows}.safetensors"
            storage.write_bytes(storage.join(folder, path), content)
            entries[path] = {"bytes": len(content), "sha256": storage.sha256(content)}
    return entries


def read_tables(folder: str, entries: Mapping[str, tuple[int, str]], topology: Topology) -> dict[str, Share]:
    """The rows of every table that lie on this rank, by `folder_of` its name, on the CPU; no collective.

    Of the files just those are read that hold any of them.

    Args:
        folder: as for `save_tables`.
        entries: size and sha256 of the files of all ranks, as `save_tables` returned them.

    Raises:
        DamagedTable: a file is missing, truncated or altered.
    """
    return {name: _read(name, folder, entries, topology) for name in sorted({path.partition("/")[0] for path in entries})}


def folder_of(name: str) -> str:
    """The folder of a table's files, whatever characters its name has."""
    plain = re.sub(r"[^A-Za-z0-9._-]|^\.", "_", name)[:80]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _read(name: str, folder: str, entries: Mapping[str, tuple[int, str]], topology: Topology) -> Share:
    rows, pieces = _pieces(name, folder, entries)
    own = share(rows, topology.rank, topology.world)
    needed = [piece for piece in pieces if max(piece[0], own.start) < min(piece[1], own.stop)]
    values, squares = torch.empty(0), torch.empty(len(own))
    for number, (first, last, path) in enumerate(needed or pieces[:1]):  # a rank without rows learns their width, too
        found = load(_content(storage.join(folder, path), entries[path]))
        if number == 0:
            values = torch.empty(len(own), found["values"].shape[1])
        begin, end = max(first, own.start), min(last, own.stop)
        here, there = slice(begin - own.start, end - own.start), slice(begin - first, end - first)
        values[here], squares[here] = found["values"][there], found["squares"][there]
    return Share(rows, values, squares)


def _pieces(name: str, folder: str, entries: Mapping[str, object]) -> tuple[int, list[tuple[int, int, str]]]:
    """Rows of a table; first row, row behind the last and path of each of its files, which together hold every row once."""
    named = [(path, _NAME.fullmatch(path.removeprefix(f"{name}/"))) for path in entries if path.startswith(f"{name}/")]
    pieces = sorted((int(found[1]), int(found[2]), path) for path, found in named if found)
    rows = max((int(found[3]) for _, found in named if found), default=0)
    ends = [0, *(last for _, last, _ in pieces)]
    if not rows or [first for first, _, _ in pieces] != ends[:-1] or ends[-1] != rows:
        raise DamagedTable(f"{storage.join(folder, name)} is incomplete: its files do not hold each of the {rows} rows once")
    return rows, pieces


def _content(uri: str, expected: tuple[int, str]) -> bytes:
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        raise DamagedTable(f"{uri} is missing") from None
    if len(content) != expected[0]:
        raise DamagedTable(f"{uri} is damaged: it has {len(content)} bytes, not {expected[0]}")
    if storage.sha256(content) != expected[1]:
        raise DamagedTable(f"{uri} is damaged: it does not match its hash")
    return content
