"""The native checkpoint: every rank writes and reads its own DeepSpeed shards, so that no host ever holds all moments.

Parameters and state are those of a portable checkpoint, for evaluation and export; `shards/` stands in place of the moments. At
another number of ranks, another ZeRO stage or where other groups are trained, DeepSpeed's own converter makes files by parameter
name of the shards, and these are read by name. Its loader of such files is not used: under ZeRO-3, DeepSpeed 0.19.8 gives all
parameter groups the step count and the weight decay of the first one, and it refuses to go from ZeRO-3 to 2 and back.
"""

import argparse
import hashlib
import io
import logging
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ctrsink import storage
from ctrsink.dist import Topology, all_sum
from ctrsink.errors import InputError, RunError, first_line
from ctrsink.train.checkpoint import signature
from ctrsink.train.checkpoint.checkpoint import (
    PARAMETERS,
    SHARDS,
    STATE,
    Checkpoint,
    DamagedCheckpoint,
    find_checkpoint,
    folder_of,
    latest_checkpoint,
    load_checkpoint,
    read_marker,
)
from ctrsink.train.checkpoint.shared import Entries, agree, gather, save_shared, write_tables
from ctrsink.train.engine import Engine, EngineState
from ctrsink.train.tensors import in_memory, joined, shapes_of

log = logging.getLogger("ctrsink.train")
T = TypeVar("T")


@dataclass
class Shards:
    """The shards of one checkpoint that this rank needs, checked against their hashes, on this host."""

    checkpoint: Checkpoint
    folder: str
    """Of the checkpoint."""
    whole: bool
    """Whether the ranks hold all shards for a conversion, one per host, instead of each its own."""
    local: Path | None
    """Holds their folder, `shards`, and nothing else; None where another rank of the host has them."""
    temporary: tempfile.TemporaryDirectory[str]


def save_native(engine: Engine, run_dir: str, checkpoint: Checkpoint, before: Callable[[], object] = lambda: None) -> str:
    """Collective, see `save_shared`; each rank writes its shards to the node's temporary folder, and uploads them.

    Args:
        engine: under ZeRO 1 to 3.
        checkpoint: its parameters are those that the engine does not train; its moments are not looked at.
        before: see `save_shared`.

    Raises:
        RunError, InputError: some rank could not write its part; then all raise, and there is no checkpoint.
    """
    topology = engine.topology
    native = {"world": topology.world, "zero_stage": engine.zero_stage}
    trained = engine.given_state(()).parameters  # under ZeRO 1 and 2 each rank has room for them
    if engine.zero_stage < 3:
        trained = in_memory(trained, topology.is_first)
    whole = replace(checkpoint, parameters=joined(checkpoint.parameters, trained), native=native)

    def write(folder: str) -> Entries:
        return _write_shards(engine, storage.join(folder, SHARDS)) | write_tables(engine.tables.all, folder)

    return save_shared(run_dir, whole, (PARAMETERS, STATE), write, topology, before)


def restore(run_dir: str, zero_stage: int, topology: Topology) -> tuple[Checkpoint, Shards | None] | None:
    """Collective: the newest checkpoint that is whole, with this rank's rows of sharded tables, and the shards of a native one.

    All ranks get the same. A checkpoint of which any rank finds a file altered is passed over with a warning, as
    `latest_checkpoint` does. Nothing is unpickled here, and later nothing that did not match its hash. None where no checkpoint
    was ever finished.

    Raises:
        InputError: checkpoints were finished, but none is whole any more.
    """
    before: int | None = None
    while True:
        newest = latest_checkpoint(run_dir, before, topology) if topology.is_first else None
        step = int(all_sum([newest.step if newest else 0], topology)[0])
        if step == 0:
            return None
        checkpoint, damage = opened(run_dir, step, newest, topology)
        if checkpoint is not None and damage is None and not checkpoint.native:
            return checkpoint, None
        if checkpoint is not None and damage is None:
            whole = checkpoint.native != {"world": topology.world, "zero_stage": zero_stage}
            shards, damage = _by_all(partial(_fetch, folder_of(run_dir, step), checkpoint, whole, topology), topology)
            if shards is not None and damage is None:
                return checkpoint, shards
        if topology.is_first:
            log.warning("%s; looking for one before it", damage)
        before = step


def opened(run_dir: str, step: int, newest: Checkpoint | None, topology: Topology) -> tuple[Checkpoint | None, str | None]:
    """Collective: the checkpoint, which one rank of each host fetches and checks, and the first damage that any rank found."""
    hosts = gather(socket.gethostname(), topology)
    leader = hosts.index(hosts[topology.rank])
    leads = leader == topology.rank
    own, damage = _by_all(lambda: (newest or find_checkpoint(run_dir, step, topology)) if leads else None, topology)
    if damage is not None:
        return None, damage
    places = gather(own.here.path if own is not None and own.here is not None else None, topology)
    found = _by_all(lambda: own or load_checkpoint(folder_of(run_dir, step), topology, places[leader]), topology)
    if own is not None and own.here is not None and own.here.temporary is not None:
        own.here.temporary.cleanup()  # all have opened it
    return found


def _by_all(read: Callable[[], T], topology: Topology) -> tuple[T | None, str | None]:
    """Collective: what this rank reads, and the first damage that any rank found."""
    found, damage = None, None
    try:
        found = read()
    except DamagedCheckpoint as error:
        damage = str(error)
    return found, next((told for told in gather(damage, topology) if told is not None), None)


def load_native(engine: Engine, shards: Shards) -> None:
    """Collective: give a new engine the moments and step counts of the checkpoint, and remove what lay on this host for it.

    Args:
        engine: nothing was stepped yet; its model holds the parameters of the checkpoint.

    Raises:
        InputError: DeepSpeed cannot convert these shards.
    """
    checkpoint, topology = shards.checkpoint, engine.topology
    same_groups = checkpoint.steps.keys() == engine.steps().keys()
    if not shards.whole and same_groups:
        path, _ = engine.deepspeed.load_checkpoint(str(shards.local), tag=SHARDS, load_module_strict=False)
        agree(None if path else RunError(f"DeepSpeed found nothing in {shards.local}"), "could not load its shards", topology)
        if engine.zero_stage < 3:  # its views of the moments, by parameter, are still those of the state that was replaced
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        shards.temporary.cleanup()
        return
    error, universal = None, None
    try:
        if not shards.whole:  # the run goes on with a stage that trains something else
            shards = _fetch(shards.folder, checkpoint, True, topology)
        if shards.local is not None:
            universal = shards.local / "universal"
            _convert(shards.local / SHARDS, universal)
    except (InputError, RunError) as caught:  # damaged, or the storage is away
        error = caught
    except Exception as caught:
        source = f"ZeRO-{checkpoint.native['zero_stage']} on {checkpoint.native['world']} ranks"
        target = f"ZeRO-{engine.zero_stage} on {topology.world}"
        hint = "go on with as many ranks and the same ZeRO stage as it was saved with"
        error = InputError(f"{shards.folder}: cannot convert {source} for {target} ({first_line(caught)}): {hint}")
    agree(error, "could not convert the shards", topology)
    places = gather((socket.gethostname(), universal), topology)
    here = next(place for host, place in places if host == places[topology.rank][0] and place is not None)
    # Without this, a rank that cannot see the files would take all moments for missing, and start with fresh ones.
    hidden = None if here.is_dir() else RunError(f"{here} is not there: give every host its own name and one temporary folder")
    agree(hidden, "does not see the converted shards", topology)
    moments: Any = _Moments(here / "zero", shapes_of(checkpoint.parameters))
    engine.load(EngineState({}, moments, checkpoint.steps))
    gather(None, topology)  # every rank of the host has read
    shards.temporary.cleanup()


class _Moments(Mapping[str, torch.Tensor]):
    """`<parameter>/exp_avg` and `/exp_avg_sq` of a converted checkpoint, each read when it is asked for."""

    def __init__(self, folder: Path, shapes: dict[str, torch.Size]) -> None:
        self.folder, self.shapes = folder, shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self.folder / f"{name}.pt"
        if not path.is_file():
            raise KeyError(name)
        found = torch.load(path, map_location="cpu", weights_only=True)
        # Of ZeRO-3 shards the converter makes flat tensors.
        return (found["param"] if isinstance(found, dict) else found).view(self.shapes[name.rpartition("/")[0]])

    def __iter__(self) -> Iterator[str]:
        return (str(path.relative_to(self.folder).with_suffix("")) for path in self.folder.rglob("exp_avg*.pt"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _write_shards(engine: Engine, uri: str) -> Entries:
    """This rank's shards, put at `uri`; returns their entries in the marker."""
    with tempfile.TemporaryDirectory(prefix="ctrsink-shards-") as temporary:
        # Without `latest`, which is not written atomically; what is frozen comes again from the seed or the backbone's folder.
        with _late(engine.deepspeed.checkpoint_engine) as failed:
            engine.deepspeed.save_checkpoint(temporary, tag=SHARDS, save_latest=False, exclude_frozen_parameters=True)
        if failed:
            raise RunError(f"{temporary}: {first_line(failed[0])}; the node's temporary folder must hold this rank's shards")
        folder = Path(temporary) / SHARDS
        for script in folder.glob("*.py"):
            script.unlink()
        paths = sorted(folder.glob("*.pt"))
        entries = {f"{SHARDS}/{p.name}": {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in paths}
        if paths:
            storage.upload_dir(folder, uri)
    return entries


@contextmanager
def _late(writer: Any) -> Generator[list[Exception], None, None]:
    """Failures of DeepSpeed's file writer are kept, not raised: every rank must reach the barrier at the end of its save."""
    failed: list[Exception] = []
    save = writer.save

    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return save(*args, **kwargs)
        except Exception as error:
            failed.append(error)

    writer.save = guarded
    try:
        yield failed
    finally:
        del writer.save  # the class's own is behind it


def _fetch(folder: str, checkpoint: Checkpoint, whole: bool, topology: Topology) -> Shards:
    """Collective: the shards that this rank needs: its own, or all of them on the first rank of each host.

    Raises:
        DamagedCheckpoint: one of them is missing or altered; other ranks may have found theirs whole.
    """
    hosts = gather(socket.gethostname(), topology)
    converts = hosts.index(hosts[topology.rank]) == topology.rank
    temporary = tempfile.TemporaryDirectory(prefix="ctrsink-shards-")
    shards = Shards(checkpoint, folder, whole, None, temporary)
    if whole and not converts:
        return shards
    shards.local = Path(temporary.name)
    (shards.local / SHARDS).mkdir()
    for name, expected in read_marker(folder).items():
        if not name.startswith(f"{SHARDS}/") or not (whole or _needed(name, topology.rank)):
            continue
        path = shards.local / name
        try:
            if storage.is_remote(folder):
                storage.download(storage.join(folder, name), path)
            elif signature.is_asked():  # what was checked is what is loaded, whoever may write there
                shutil.copyfile(storage.local_path(storage.join(folder, name)), path)
            else:  # of the folder, only what the marker names is ever looked at
                path.symlink_to(storage.local_path(storage.join(folder, name)).resolve())
            if (path.stat().st_size, _sha256(path)) != expected:
                raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {name} does not match its hash")
        except FileNotFoundError:
            raise DamagedCheckpoint(f"the checkpoint {folder} is incomplete: {name} is missing") from None
    return shards


def _needed(name: str, rank: int) -> bool:
    """Whether a shard is this rank's, or everybody's (under ZeRO 1 and 2: the parameters)."""
    owner = re.search(r"zero_pp_rank_(\d+)_", name)
    return owner is None or int(owner[1]) == rank


def _convert(source: Path, target: Path) -> None:
    """Files by parameter name of all ranks' shards, by DeepSpeed's own converter."""
    from deepspeed.checkpoint.ds_to_universal import main

    arguments = argparse.Namespace(
        input_folder=str(source), output_folder=str(target), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    target.mkdir(parents=True)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            main(arguments)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
