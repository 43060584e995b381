"""A checkpoint that all ranks write together: each its own files, and the first one the marker when all are there."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar, cast

import torch.distributed as dist

from ctrsink import storage
from ctrsink.dist import Topology
from ctrsink.errors import PeerLost, first_line
from ctrsink.run.listing import folder_of
from ctrsink.tables.files import save_tables
from ctrsink.tables.table import RowTable
from ctrsink.train.checkpoint.checkpoint import MOMENTS, PARAMETERS, TABLES, Checkpoint, write_files, write_marker
from ctrsink.train.checkpoint.tensor_file import pieces
from ctrsink.train.tensors import Tensors

T = TypeVar("T")
Entries = dict[str, dict[str, Any]]
"""Of files in the marker, by path: `bytes` and `sha256`."""


def save_shared(
    run_dir: str,
    checkpoint: Checkpoint,
    names: tuple[str, ...],
    write: Callable[[str], Entries],
    topology: Topology,
    before: Callable[[], object],
) -> str:
    """Collective: every rank must call it; it returns the folder when the checkpoint is whole.

    Args:
        checkpoint: of interest on the first rank only, which writes these `names` of it; but `Tensors` are gathered by all, one
            after another as they are written.
        write: writes this rank's files below the folder that it is given; all ranks call it, or none does.
        before: called first; what it raises on one rank is told on all of them.

    Raises:
        RunError, InputError: some rank could not write its part; then all raise, and there is no checkpoint.
    """
    folder = folder_of(run_dir, checkpoint.step)
    _agreed(before, "could not begin to save", topology)
    try:
        entries = _agreed(lambda: write(folder), "could not save its part of the checkpoint", topology)
        entries |= _agreed(
            lambda: _write_whole(folder, checkpoint, names, topology), "could not save its part of the checkpoint", topology
        )
        gathered = gather(entries, topology)
        whole = {name: entry for one in gathered for name, entry in one.items()}
        _agreed(lambda: write_marker(folder, whole) if topology.is_first else None, "could not finish the checkpoint", topology)
    except Exception:
        if topology.is_first and not storage.is_remote(folder):  # a full disk needs the room; remains on S3 go with the next save
            with suppress(Exception):
                storage.delete(folder)
        raise
    return folder


def _agreed(work: Callable[[], T], what: str, topology: Topology) -> T:
    """Collective: what this rank's work gives; where that of any rank fails all raise, see `agree`."""
    found, error = None, None
    try:
        found = work()
    except Exception as caught:
        error = caught
    agree(error, what, topology)
    return cast(T, found)


def _write_whole(folder: str, checkpoint: Checkpoint, names: tuple[str, ...], topology: Topology) -> Entries:
    """Collective: the first rank writes files of all ranks' tensors; those that are gathered, one tensor after another."""
    entries: Entries = {}
    errors: list[Exception] = []
    for name in names:
        tensors = {PARAMETERS: checkpoint.parameters, MOMENTS: checkpoint.moments}.get(name)
        try:
            if isinstance(tensors, Tensors):
                entries |= _write_gathered(folder, name, tensors, topology)
            elif topology.is_first:
                entries |= write_files(folder, checkpoint, (name,))
        except Exception as caught:  # what follows may be collective
            errors.append(caught)
    if errors:
        raise errors[0]
    return entries


def _write_gathered(folder: str, name: str, tensors: Tensors, topology: Topology) -> Entries:
    left = pieces(tensors)
    digest, size = hashlib.sha256(), 0
    try:
        if topology.is_first:
            with storage.writing(storage.join(folder, name)) as write:
                for piece in left:
                    write(piece)
                    digest.update(piece)
                    size += len(piece)
    finally:
        for _ in left:  # on the other ranks, and on the first where its disk is full: all gather alike
            pass
    return {name: {"bytes": size, "sha256": digest.hexdigest()}} if topology.is_first else {}


def write_tables(tables: Mapping[str, RowTable], folder: str) -> Entries:
    """Write this rank's rows, as they are now, below a checkpoint's folder."""
    return {f"{TABLES}/{path}": entry for path, entry in save_tables(tables, storage.join(folder, TABLES)).items()}


def gather(value: T, topology: Topology) -> list[T]:
    """The values of all ranks, in their order."""
    if topology.world == 1:
        return [value]
    found: list[Any] = [None] * topology.world
    dist.all_gather_object(found, value)
    return found


def agree(error: Exception | None, what: str, topology: Topology) -> None:
    """Collective: raise this rank's error, or PeerLost that tells of the first other rank that has one."""
    reasons = gather(first_line(error) if error else None, topology)
    if error is not None:
        raise error
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise PeerLost(f"rank {rank} {what}: {reason}")
