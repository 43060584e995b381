"""The portable checkpoint: safetensors by parameter name, loadable at any number of workers and any ZeRO stage; no pickle.

A folder per checkpoint; `complete.json`, with size and sha256 of each file, is written last. Without it, or with a file that
does not match, the folder is no checkpoint.
"""

import json
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save

from ctrsink import storage
from ctrsink.errors import InputError

FOLDER = "checkpoints"
FILES = ("parameters.safetensors", "moments.safetensors", "state.json")
MARKER = "complete.json"
log = logging.getLogger("ctrsink.train")


class DamagedCheckpoint(InputError):
    """A checkpoint's file is missing or is not what was written; an outage of the storage is not this."""


@dataclass
class Checkpoint:
    """State of a run after `step` optimiser steps."""

    step: int
    position: int
    """Of the stream: sequences consumed since the run began."""
    parameters: dict[str, torch.Tensor]
    """fp32 values of every parameter that any stage so far has trained."""
    moments: dict[str, torch.Tensor]
    steps: dict[str, int]
    """See EngineState."""
    dataset: str
    """Identity of the data set, see Manifest.identity."""
    controller: dict[str, Any] = field(default_factory=dict)
    """State of the stage controller."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the validation sample, where it was measured at this step."""
    trained: dict[str, int] = field(default_factory=dict)
    """The impressions trained on so far, see Audit."""
    seconds: float = 0.0
    """Spent in training steps so far."""


def save_checkpoint(run_dir: str, checkpoint: Checkpoint) -> str:
    """Write `checkpoint` below `run_dir` and return its folder."""
    folder = folder_of(run_dir, checkpoint.step)
    kept = ("step", "position", "steps", "dataset", "controller", "metrics", "trained", "seconds")
    state = {name: getattr(checkpoint, name) for name in kept}
    contents = (save(checkpoint.parameters), save(checkpoint.moments), json.dumps(state).encode())
    files = dict(zip(FILES, contents, strict=True))
    for name, content in files.items():
        storage.write_bytes(storage.join(folder, name), content)
    marker = {name: {"bytes": len(content), "sha256": storage.sha256(content)} for name, content in files.items()}
    storage.write_bytes(storage.join(folder, MARKER), json.dumps(marker).encode())
    return folder


def folder_of(run_dir: str, step: int) -> str:
    """Where the checkpoint of `step` lies."""
    return storage.join(run_dir, FOLDER, f"step-{step:08d}")


def list_checkpoints(run_dir: str) -> list[str]:
    """Folders of the run's checkpoints, complete or not, newest first."""
    names = [n for n in storage.list_dirs(storage.join(run_dir, FOLDER)) if n.startswith("step-")]
    return [storage.join(run_dir, FOLDER, name) for name in sorted(names, reverse=True)]


def latest_checkpoint(run_dir: str) -> Checkpoint | None:
    """The newest checkpoint that is whole; each newer one that is not is named in a warning. None where none was ever finished.

    Raises:
        InputError: checkpoints were finished, but none is whole any more: to start anew is the user's to say.
    """
    finished = False
    for folder in list_checkpoints(run_dir):
        try:
            return load_checkpoint(folder)
        except DamagedCheckpoint as error:
            finished = finished or storage.exists(storage.join(folder, MARKER))
            log.warning("%s; looking for one before it", error)
    if finished:
        raise InputError(f"{run_dir} has no whole checkpoint left: restore one, or delete {FOLDER}/ there to start anew")
    return None


def find_checkpoint(run_dir: str, step: int | None = None) -> Checkpoint:
    """The checkpoint of `step`, or the newest whole one.

    Raises:
        InputError: there is none, or that of `step` is damaged.
    """
    if step is not None:
        folders = list_checkpoints(run_dir)
        if folder_of(run_dir, step) not in folders:
            steps = ", ".join(str(int(folder.rpartition("-")[2])) for folder in reversed(folders)) or "none"
            raise InputError(f"{run_dir} has no checkpoint of step {step}: choose one of those it has ({steps})")
        return load_checkpoint(folder_of(run_dir, step))
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        raise InputError(f"{run_dir} holds no whole checkpoint yet: train it first")
    return checkpoint


def require_data(run_dir: str, checkpoint: Checkpoint, datasets: tuple[str, ...], uri: str) -> None:
    """Refuse a data set other than the one that the checkpoint was trained on.

    Raises:
        InputError: the data set at `uri` is another; `datasets` says what it may have been, see rundir.identities.
    """
    if checkpoint.dataset not in datasets:
        raise InputError(
            f"{run_dir} was trained on another data set than the one now in {uri}: "
            "give the old one back, or choose another run_dir"
        )


def load_checkpoint(folder: str) -> Checkpoint:
    """Read a checkpoint and check it against its marker.

    Raises:
        InputError: it is incomplete or altered.
    """
    try:
        entries = json.loads(_read(folder, MARKER))
        expected = {name: (entries[name]["bytes"], entries[name]["sha256"]) for name in FILES}
    except (ValueError, KeyError, TypeError):
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {MARKER} is not what was written") from None
    contents: dict[str, bytes] = {}
    for name in FILES:
        content = _read(folder, name)
        if (len(content), storage.sha256(content)) != expected[name]:
            raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {name} does not match its hash")
        contents[name] = content
    state: dict[str, Any] = json.loads(contents["state.json"])
    parameters, moments = (load(contents[f"{name}.safetensors"]) for name in ("parameters", "moments"))
    return Checkpoint(parameters=parameters, moments=moments, **state)


def _read(folder: str, name: str) -> bytes:
    try:
        return storage.read_bytes(storage.join(folder, name))
    except FileNotFoundError:
        raise DamagedCheckpoint(f"the checkpoint {folder} is incomplete: {name} is missing") from None
