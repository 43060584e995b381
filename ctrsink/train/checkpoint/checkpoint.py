"""The portable checkpoint: safetensors by parameter name, loadable at any number of workers and any ZeRO stage; no pickle.

A folder per checkpoint; `complete.json`, with size and sha256 of each file, is written last. Without it, or with a file that
does not match, the folder is no checkpoint. A native checkpoint (see `native`) has the same parameters and state; its moments are
DeepSpeed's shards, of which only presence and size are looked at here. Sharded tables of embeddings have files of their own
(`tables.files`), of which each rank reads those with rows of its own.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from ctrsink import kept, storage, strict_json
from ctrsink.dist import Topology
from ctrsink.errors import InputError, RunError
from ctrsink.run.listing import FOLDER, Step, folder_of, list_checkpoints, step_of
from ctrsink.tables.files import DamagedTable, read_tables
from ctrsink.tables.shares import Share
from ctrsink.train.checkpoint.signature import KEY, distrusted, is_asked, sign
from ctrsink.train.checkpoint.tensor_file import opened, to_safetensors
from ctrsink.train.tensors import renamed

PARAMETERS, MOMENTS, STATE = FILES = ("parameters.safetensors", "moments.safetensors", "state.json")
MARKER = "complete.json"
SHARDS = "shards"
"""Folder in a native checkpoint."""
TABLES = "tables"
"""Folder in the checkpoint of a model with sharded tables."""
BEST = "best.json"
"""Beside the checkpoints: step, metric and value of the best one."""
log = logging.getLogger("ctrsink.train")


class DamagedCheckpoint(InputError):
    """A checkpoint's file is missing or is not what was written; an outage of the storage is not this."""


@dataclass(frozen=True)
class Here:
    """A folder of this host with parameters and moments of a checkpoint."""

    path: Path
    temporary: tempfile.TemporaryDirectory[str] | None = None
    """Goes with the checkpoint, although what has opened its files may read on; None where it is the checkpoint's own folder."""


@dataclass
class Checkpoint:
    """State of a run after `step` optimiser steps."""

    step: int
    position: int
    """Of the stream: sequences consumed since the run began."""
    parameters: Mapping[str, torch.Tensor]
    """fp32 values of every parameter that any stage so far has trained."""
    moments: Mapping[str, torch.Tensor]
    steps: dict[str, int]
    """See EngineState."""
    dataset: str
    """Identity of the data set, see Manifest.identity."""
    seconds: float = 0.0
    """Spent in training steps so far."""
    controller: dict[str, Any] = field(default_factory=dict)
    """State of the stage controller, as JSON has it."""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """Of the last validation before it; empty where there was none. nan, and None once saved: the sample has no such metric."""
    trained: dict[str, Any] = field(default_factory=dict)
    """Audit of what was trained on: counts and a checksum."""
    native: dict[str, int] = field(default_factory=dict)
    """`world` and `zero_stage` of the shards that hold the moments; empty in a portable checkpoint."""
    precision: str = ""
    """What the run trains in, which `train.precision: auto` leaves open; empty in a checkpoint from before there was that."""
    tables: dict[str, Share] = field(default_factory=dict)
    """One rank's rows of sharded tables, where a checkpoint is read by that rank; see `read_tables`."""
    here: Here | None = None
    """Where it was opened, for other processes of the host."""

    def under_present_names(self, earlier: Mapping[str, str]) -> "Checkpoint":
        """With parameters called what they are called now; `earlier` is `Family.earlier_names`.

        Raises:
            InputError: it is a native one that has earlier names, which DeepSpeed's shards hold inside.
        """

        def now(name: str) -> str:
            before = next(filter(name.startswith, earlier), "")
            return earlier.get(before, "") + name.removeprefix(before)

        if self.native and any(now(name) != name for name in self.parameters):
            where = f"the native checkpoint of step {self.step}"
            raise InputError(f"{where} was saved by an older ctrsink: finish the run with that one")
        return replace(self, parameters=renamed(self.parameters, now), moments=renamed(self.moments, now))


def save_checkpoint(run_dir: str, checkpoint: Checkpoint) -> str:
    """Write `checkpoint` below `run_dir` and return its folder.

    Raises:
        RunError: the disk is full or fails; nothing of the checkpoint is left on it.
    """
    folder = folder_of(run_dir, checkpoint.step)
    try:
        entries = write_files(folder, checkpoint, FILES)
        write_marker(folder, entries)
    except RunError:
        with suppress(Exception):
            storage.delete(folder)
        raise
    return folder


def write_files(folder: str, checkpoint: Checkpoint, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Write these of a checkpoint's `FILES`; returns their entries in the marker. One file is held in memory at a time."""
    entries = {}
    for name in names:
        content = _content(checkpoint, name)
        entries[name] = {"bytes": len(content), "sha256": storage.sha256(content)}
        storage.write_bytes(storage.join(folder, name), content)
    return entries


def write_marker(folder: str, entries: dict[str, dict[str, Any]]) -> None:
    """Make the folder a checkpoint of the files in `entries`; all of them must have been written."""
    marker = json.dumps(kept.stamped(entries)).encode()
    sign(folder, marker)
    storage.write_bytes(storage.join(folder, MARKER), marker)


def _content(checkpoint: Checkpoint, name: str) -> bytes | memoryview:
    if name == STATE:
        names = [f.name for f in fields(checkpoint) if f.name not in ("parameters", "moments", "tables", "here")]
        return strict_json.dumps(kept.stamped({name: getattr(checkpoint, name) for name in names})).encode()
    return to_safetensors(checkpoint.parameters if name == PARAMETERS else checkpoint.moments)


def latest_checkpoint(run_dir: str, before: int | None = None, reader: Topology | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole; each newer one that is not is named in a warning. None where none was ever finished.

    Args:
        before: only of earlier steps: the finished one of this step turned out to be damaged.
        reader: see `load_checkpoint`.

    Raises:
        InputError: checkpoints were finished, but none is whole any more: to start anew is the user's to say.
    """
    finished = before is not None
    for folder in list_checkpoints(run_dir):
        if before is not None and step_of(folder) >= before:
            continue
        try:
            return load_checkpoint(folder, reader)
        except DamagedCheckpoint as error:
            finished = finished or storage.exists(storage.join(folder, MARKER))
            log.warning("%s; looking for one before it", error)
    if finished:
        keyed = f"set {KEY} to the key that signed them, unset it if you trust all who may write there, " if is_asked() else ""
        raise InputError(
            f"{run_dir} has no whole checkpoint left (the warnings above say why): {keyed}restore one, or delete {FOLDER}/ there "
            "to start anew"
        )
    return None


def find_checkpoint(run_dir: str, step: Step = None, reader: Topology | None = None) -> Checkpoint:
    """The checkpoint of `step`, the best, or the newest whole one.

    Args:
        reader: see `load_checkpoint`.

    Raises:
        InputError: there is none, or that of `step` is damaged.
    """
    if step == "best":
        step = _best_step(run_dir)
    if step is not None:
        folders = list_checkpoints(run_dir)
        if folder_of(run_dir, step) not in folders:
            steps = ", ".join(str(step_of(folder)) for folder in reversed(folders)) or "none"
            raise InputError(f"{run_dir} has no checkpoint of step {step}: choose one of those it has ({steps})")
        return load_checkpoint(folder_of(run_dir, step), reader)
    checkpoint = latest_checkpoint(run_dir, reader=reader)
    if checkpoint is None:
        raise InputError(f"{run_dir} holds no whole checkpoint yet: train it first")
    return checkpoint


def _best_step(run_dir: str) -> int:
    path = storage.join(run_dir, FOLDER, BEST)
    try:
        return int(kept.opened(json.loads(storage.read_bytes(path)), path)["step"])
    except FileNotFoundError:
        hint = "train with train.keep.best and a validation, or name a step"
        raise InputError(f"{run_dir} knows no best checkpoint: {hint}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged: name a step instead") from None


def require_data(run_dir: str, checkpoint: Checkpoint, datasets: tuple[str, ...], uri: str) -> None:
    """Refuse a data set other than the one that the checkpoint was trained on.

    Raises:
        InputError: the data set at `uri` is another; `datasets` says what it may have been, see run.folder.identities.
    """
    if checkpoint.dataset not in datasets:
        raise InputError(
            f"{run_dir} was trained on another data set than the one now in {uri}: "
            "give the old one back, or choose another run_dir"
        )


def load_checkpoint(folder: str, reader: Topology | None = None, checked: Path | None = None) -> Checkpoint:
    """Open a checkpoint and check it against its marker; its tensors are read when they are asked for.

    Args:
        reader: the rank whose rows of sharded tables are read; None: no tables are, their presence and size is looked at.
        checked: where another process of this host has the checkpoint's large files, and has checked them; see `Checkpoint.here`.

    Raises:
        InputError: it is incomplete or altered, or of a newer version.
    """
    entries = read_marker(folder)
    others = {name: size for name, (size, _) in entries.items() if name not in FILES}
    if others:
        found = {one.path: one.bytes for one in storage.find(folder)}
        for name, size in others.items():
            if found.get(name) != size:
                what = f"{name} has another size" if name in found else f"{name} is missing"
                raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {what}")
    content = _read(folder, STATE)
    if (len(content), storage.sha256(content)) != entries[STATE]:
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {STATE} does not match its hash")
    here = _fetch(folder, entries) if checked is None else Here(checked)
    try:
        state = kept.opened(json.loads(content), storage.join(folder, STATE))
        moments = opened(here.path / MOMENTS) if MOMENTS in entries else {}
        checkpoint = Checkpoint(parameters=opened(here.path / PARAMETERS), moments=moments, here=here, **state)
    except FileNotFoundError:
        hint = "give every host its own name, and all processes of it one temporary folder"
        raise InputError(f"{here.path}, which another process of this host has read, is not there: {hint}") from None
    except (ValueError, TypeError, KeyError):
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: its files are not what was written") from None
    if reader is not None:
        checkpoint.tables = _tables(folder, entries, reader)
    return checkpoint


def _fetch(folder: str, entries: dict[str, tuple[int, str]]) -> "Here":
    """The large files of a checkpoint as files of this host that match their hashes; nothing is held of them."""
    here = Here(storage.local_path(folder)) if not storage.is_remote(folder) else None
    if here is None:
        temporary = tempfile.TemporaryDirectory(prefix="ctrsink-checkpoint-")
        here = Here(Path(temporary.name), temporary)
    for name in (PARAMETERS, MOMENTS):
        if name not in entries:
            continue
        path = here.path / name
        try:
            if here.temporary is not None:
                storage.download(storage.join(folder, name), path)
            with path.open("rb") as file:
                found = path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise DamagedCheckpoint(f"the checkpoint {folder} is incomplete: {name} is missing") from None
        if found != entries[name]:
            raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {name} does not match its hash")
    return here


def _tables(folder: str, entries: dict[str, tuple[int, str]], reader: Topology) -> dict[str, Share]:
    own = {name.removeprefix(f"{TABLES}/"): entry for name, entry in entries.items() if name.startswith(f"{TABLES}/")}
    try:
        return read_tables(storage.join(folder, TABLES), own, reader)
    except DamagedTable as error:
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {error}") from None


def read_marker(folder: str) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file of a checkpoint, by its path in the folder.

    Raises:
        DamagedCheckpoint: there is no marker, or it is not what was written, or not signed where it must be.
        InputError: it is of a newer version.
    """
    marker = _read(folder, MARKER)
    if (reason := distrusted(folder, marker)) is not None:
        raise DamagedCheckpoint(f"the checkpoint {folder} {reason}")
    try:
        entries = kept.opened(json.loads(marker), storage.join(folder, MARKER))
        found = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
        others = found.keys() - FILES
        shards = [name for name in others if name.startswith(f"{SHARDS}/")]
        if not {PARAMETERS, STATE} <= found.keys() or (MOMENTS in found) == bool(shards):
            raise ValueError
        if any(not name.startswith((f"{SHARDS}/", f"{TABLES}/")) or storage.leads_out(name) for name in others):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {MARKER} is not what was written") from None
    return found


def _read(folder: str, name: str) -> bytes:
    try:
        return storage.read_bytes(storage.join(folder, name))
    except FileNotFoundError:
        raise DamagedCheckpoint(f"the checkpoint {folder} is incomplete: {name} is missing") from None
