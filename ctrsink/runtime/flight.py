"""Torch's flight recorder: the last collectives of every rank, kept while training, left as a file by a rank that fails or hangs.

Under NCCL nobody gets an exception when a collective hangs: after `runtime.collective_timeout_s` a watchdog thread writes the
file and ends the process. Under gloo the collective raises, and the worker writes it. In both cases what stands there names the
rank that the others waited for.
"""

import logging
import os
import pickle
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch._C._distributed_c10d as c10d

from ctrsink import storage
from ctrsink.errors import first_line
from ctrsink.run.folder import FLIGHT_NAME

PREFIX = "rank-"
_PLACE = "TORCH_FR_DUMP_TEMP_FILE"  # torch appends the rank
ENTRIES = 2000  # collectives that a rank remembers: some hundred bytes each
_TOLD = 3
log = logging.getLogger("ctrsink.train")


def place_of(run_dir: str) -> Path:
    """Folder of a run's files: in its own folder, or, where that is not on a disk, in the temporary folder of each host."""
    if storage.is_remote(run_dir):
        return Path(tempfile.gettempdir()) / f"ctrsink-{FLIGHT_NAME}-{storage.sha256(run_dir.encode())[:16]}"
    return Path(storage.local_path(run_dir)) / FLIGHT_NAME


def recording(place: Path) -> dict[str, str]:
    """What the environment of a worker must hold before its process group is made; what the user has set stays, but the place."""
    wanted = {"TORCH_FR_BUFFER_SIZE": str(ENTRIES), "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    return {name: os.environ.get(name, value) for name, value in wanted.items()} | {_PLACE: str(place / PREFIX)}


def leave(rank: int) -> None:
    """Write this rank's file as NCCL's watchdog would; a failure is only warned about: something else went wrong first."""
    place = os.environ.get(_PLACE)
    if place is None:
        return
    try:
        path = Path(f"{place}{rank}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(c10d._dump_fr_trace())  # pyright: ignore[reportAttributeAccessIssue]  not in its stub
    except (OSError, RuntimeError) as error:
        log.warning("the last collectives of rank %d cannot be told: %s", rank, first_line(error))


def take(place: Path, world: int | None = None) -> str | None:
    """Who was waited for, by the files at `place`, which make room for those of the next failure; None where they tell nothing.

    Args:
        world: number of ranks, where it is known: one that hangs itself, or was ended, leaves no file.
    """
    found = {}
    for path in sorted(place.glob(f"{PREFIX}*")):
        number = path.name.removeprefix(PREFIX)
        try:
            if number.isdecimal():
                found[int(number)] = read(path)
            path.replace(path.with_name(f"last-{path.name}"))
        except (OSError, ValueError) as error:
            log.warning("%s: %s", path, first_line(error))
    silent = [rank for rank in range(world or 0) if found and rank not in found]
    missing = f"rank {_some(map(str, silent))} left no record" if silent else None
    told = "; ".join(filter(None, (waited_for(found), missing)))
    return f"{told} (flight recorder, {place}/last-{PREFIX}*)" if told else None


def read(path: Path) -> dict[str, Any]:
    """One rank's file: a pickle, of which nothing but plain values is taken.

    Raises:
        ValueError: it is damaged, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            found = _Plain(file).load()
        assert isinstance(found["entries"], list)
    except OSError:
        raise
    except Exception as error:  # whatever a torn pickle makes
        raise ValueError(f"not what torch's flight recorder writes ({type(error).__name__})") from None
    return found


class _Plain(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is no plain value")


def waited_for(records: dict[int, dict[str, Any]]) -> str | None:
    """Which ranks did not come to a collective that others had begun, by their records; None where all came equally far.

    Ranks count their collectives group by group; one that is behind in a group is the one that the others of it wait for.
    """
    last: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for rank, record in records.items():
        for entry in record["entries"]:
            if not entry.get("is_p2p"):
                of_group = last.setdefault(tuple(map(str, entry["process_group"])), {})
                if rank not in of_group or of_group[rank]["collective_seq_id"] < entry["collective_seq_id"]:
                    of_group[rank] = entry
    told = []
    for group, entries in sorted(last.items()):
        furthest = max(entries.values(), key=lambda entry: entry["collective_seq_id"])
        number = furthest["collective_seq_id"]
        reached = {rank: entries[rank]["collective_seq_id"] if rank in entries else 0 for rank in records}
        behind = [rank for rank in sorted(reached) if reached[rank] < number]
        if behind:
            ranks = _some(f"{rank} (came to {reached[rank]})" for rank in behind)
            name = group[-1] if group[-1] not in ("", "undefined") else group[0]
            told.append(f"{furthest['profiling_name']} number {number} of group {name} waited for rank {ranks}")
    return "; ".join(told[:_TOLD]) or None


def _some(ranks: Iterable[str]) -> str:
    found = list(ranks)
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
