"""Where the checkpoints of a run lie; apart from what loads them, which takes torch and so a second."""

import re
from typing import Literal

from ctrsink import storage

FOLDER = "checkpoints"
Step = int | Literal["best"] | None
"""A checkpoint as the user names it: its step, the best by `train.keep.best`, or (None) the newest whole one."""


def folder_of(run_dir: str, step: int) -> str:
    """Where the checkpoint of `step` lies."""
    return storage.join(run_dir, FOLDER, f"step-{step:08d}")


def step_of(folder: str) -> int:
    """The step whose checkpoint lies in `folder`."""
    return int(folder.rpartition("-")[2])


def list_checkpoints(run_dir: str) -> list[str]:
    """Folders of the run's checkpoints, complete or not, newest first."""
    names = [n for n in storage.list_dirs(storage.join(run_dir, FOLDER)) if re.fullmatch(r"step-\d{8,}", n)]
    return [storage.join(run_dir, FOLDER, name) for name in sorted(names, key=step_of, reverse=True)]
