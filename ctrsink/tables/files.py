"""Tables on disk: files of whole stretches of rows, which any number of ranks can read whatever number wrote them.

`<table>/<first row>-<row behind the last>-of-<rows of the table>.safetensors`, each with `values` [n, D] and `squares` [n]. A
file is small enough to be held in memory beside the table, so it is written and checked as a whole. Which files of a folder make
up a checkpoint is the caller's to remember: those of an interrupted save, by another number of ranks, may lie beside them.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load, save

from ctrsink import storage
from ctrsink.errors import InputError
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


def load_tables(tables: Mapping[str, RowTable], folder: str, entries: Mapping[str, tuple[int, str]]) -> None:
    """Read the rows that lie on this rank, of the files that hold any of them and of no others; no collective.

    Where it fails a table may hold some of both: load another checkpoint.

    Args:
        tables: by the names that they were saved under.
        folder: as for `save_tables`.
        entries: size and sha256 of the files of all ranks, as `save_tables` returned them; of other files, too.

    Raises:
        DamagedTable: a file is missing, truncated or altered.
        InputError: a table was saved with other sizes.
    """
    for name, table in tables.items():
        pieces = _pieces(name, table, folder, entries)
        for first, last, path in pieces:
            if max(first, table.own.start) >= min(last, table.own.stop):
                continue
            found = load(_content(storage.join(folder, path), entries[path]))
            if found["values"].shape[1] != table.width:
                raise _other(storage.join(folder, path), f"vectors of {found['values'].shape[1]}", f"of {table.width}")
            table.put(first, found["values"], found["squares"])


def folder_of(name: str) -> str:
    """The folder of a table's files, whatever characters its name has."""
    plain = re.sub(r"[^A-Za-z0-9._-]|^\.", "_", name)[:80]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _pieces(name: str, table: RowTable, folder: str, entries: Mapping[str, object]) -> list[tuple[int, int, str]]:
    """First row, row behind the last and path of each file of a table, which together hold every row once."""
    where, own = storage.join(folder, folder_of(name)), folder_of(name)
    named = [(path, _NAME.fullmatch(path.removeprefix(f"{own}/"))) for path in entries if path.startswith(f"{own}/")]
    pieces = sorted((int(found[1]), int(found[2]), path) for path, found in named if found)
    sizes = {int(found[3]) for _, found in named if found}
    if sizes - {table.rows}:
        raise _other(where, f"{max(sizes)} rows", f"{table.rows}")
    ends = [0, *(last for _, last, _ in pieces)]
    if [first for first, _, _ in pieces] != ends[:-1] or ends[-1] != table.rows:
        raise DamagedTable(f"{where} is incomplete: its files do not hold each of the {table.rows} rows once")
    return pieces


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


def _other(where: str, has: str, wanted: str) -> InputError:
    return InputError(f"{where} has {has}, the model's table has {wanted}: give the model the sizes that it was saved with")
