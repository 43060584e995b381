"""Native checkpoints: DeepSpeed's shards of two real ranks, taken up by as many, by fewer and under other ZeRO stages."""

import logging
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ctrsink import storage
from ctrsink.dist import Topology
from ctrsink.errors import InputError
from ctrsink.train.checkpoint.checkpoint import MARKER, SHARDS, find_checkpoint, folder_of, latest_checkpoint
from ctrsink.train.checkpoint.native import restore
from tests.conftest import BUCKET
from tests.native_ranks import LOADED
from tests.rank_processes import run_ranks

pytestmark = pytest.mark.slow  # all share three starts of processes with DeepSpeed, about a minute


@dataclass(frozen=True)
class Ran:
    """What the ranks printed, and where the runs zero3 and zero2 lie, each with checkpoints of steps 5 and 6."""

    saved: list[dict[str, Any]]
    errors: list[str]
    """By rank, of the save in which the second rank failed, under ZeRO-3."""
    loaded: list[dict[str, Any]]
    folder: Path


def start(what: str, world: int, folder: Path, repository: Path) -> list[list[dict[str, Any]]]:
    arguments = [str(world), str(folder / f"store-{what}"), str(folder)]
    return run_ranks(["-m", "tests.native_ranks", what], world, arguments, repository, 240)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Ran:
    folder = tmp_path_factory.mktemp("native")
    saved = start("save", 2, folder, repository)
    errors = [printed[0].pop("error") for printed in saved]
    for printed in saved:
        printed[2].pop("error")
    assert saved[0] == saved[1]
    return Ran(saved[0], errors, start("load", 1, folder, repository)[0], folder)


def test_as_many_ranks_go_on_from_their_own_shards(ran: Ran) -> None:
    """Moments, step counts that differ by group, and the next step are the same to the bit."""
    for whole, again in (ran.saved[0:2], ran.saved[2:4]):
        assert whole["zero"] == again["zero"]
        assert whole["steps"]["head/decay"] == 6
        assert whole["steps"]["backbone/decay"] == 4
        assert again["equal"]
        assert again["losses"] == whole["losses"][-1:]


def test_as_many_ranks_go_on_under_another_zero_stage(ran: Ran) -> None:
    other = ran.saved[4]
    assert other["equal"]
    assert other["losses"] == pytest.approx(ran.saved[0]["losses"][-1:], abs=1e-6)


@pytest.mark.parametrize("number", range(len(LOADED)), ids=[f"zero{a}-to-zero{b}" for a, b in LOADED])
def test_one_rank_goes_on_from_the_shards_of_two(ran: Ran, number: int) -> None:
    found = ran.loaded[number]
    assert (found["saved"], found["zero"], found["step"]) == (*LOADED[number], 6)
    assert found["equal"]
    assert found["losses"] == pytest.approx(ran.saved[0]["losses"][-1:], abs=1e-6)


def test_where_one_rank_cannot_save_all_raise_and_there_is_no_checkpoint(ran: Ran) -> None:
    assert "rank 1 could not save its part of the checkpoint: " in ran.errors[0]
    assert "no space left on device" in ran.errors[1]
    assert not Path(folder_of(str(ran.folder / "zero3"), 7)).exists()


def test_parameters_are_portable(ran: Ran) -> None:
    """Evaluation and export need no DeepSpeed."""
    native, portable = (find_checkpoint(str(ran.folder / name)) for name in ("zero3", "zero3-portable-6"))
    assert native.parameters.keys() == portable.parameters.keys()
    assert all(torch.equal(native.parameters[name], portable.parameters[name]) for name in portable.parameters)
    assert native.native == {"world": 2, "zero_stage": 3}


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["altered", "replaced", "truncated", "missing", "unmarked"])
def test_a_damaged_shard_is_never_loaded(ran: Ran, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    run = shutil.copytree(ran.folder / "zero3", tmp_path / "run")
    newest = Path(folder_of(str(run), 6))
    shard = newest / SHARDS / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content, trap = shard.read_bytes(), tmp_path / "trap"
    match how:
        case "altered":
            shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        case "replaced":
            shard.write_bytes(pickle.dumps(Trap(trap)).ljust(len(content), b"\0"))
        case "truncated":
            shard.write_bytes(content[:-1])
        case "missing":
            shard.unlink()
        case _:
            (newest / MARKER).unlink()
    with caplog.at_level(logging.WARNING, "ctrsink.train"):
        found = restore(str(run), 3, Topology())
    assert found is not None
    assert (found[0].step, found[0].native) == (5, {"world": 2, "zero_stage": 3})
    assert not trap.exists()
    assert len(caplog.records) == 1
    assert "step-00000006 is " in caplog.text
    assert (shard.name if how != "unmarked" else MARKER) in caplog.text


def test_no_whole_checkpoint_left_is_an_error(ran: Ran, tmp_path: Path) -> None:
    run = shutil.copytree(ran.folder / "zero2", tmp_path / "run")
    for shard in run.rglob("zero_pp_rank_0*"):
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="has no whole checkpoint left"):
        restore(str(run), 2, Topology())
    assert restore(str(tmp_path / "empty"), 2, Topology()) is None


@pytest.mark.usefixtures("s3_server")
def test_shards_come_from_s3(ran: Ran) -> None:
    run = f"s3://{BUCKET}/native"
    storage.upload_dir(ran.folder / "zero3", run)
    found = restore(run, 3, Topology())
    assert found is not None
    checkpoint, shards = found
    assert shards is not None
    assert shards.local is not None
    names = {path.name for path in (shards.local / SHARDS).iterdir()}
    assert names == {f"zero_pp_rank_{rank}_mp_rank_00_{what}_states.pt" for rank in (0, 1) for what in ("model", "optim")}
    storage.delete(storage.join(folder_of(run, 6), SHARDS, "zero_pp_rank_1_mp_rank_00_model_states.pt"))
    before = latest_checkpoint(run)
    assert before is not None
    assert (checkpoint.step, before.step) == (6, 5)
