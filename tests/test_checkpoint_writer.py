"""Checkpoints written beside the training: failures, retention, the best one, and being killed anywhere."""

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrsink import kept, storage
from ctrsink.config.train import KeepSpec
from ctrsink.dist import Topology
from ctrsink.errors import InputError, RunError, StorageUnavailable
from ctrsink.train.checkpoint import saving
from ctrsink.train.checkpoint.checkpoint import (
    BEST,
    FOLDER,
    MARKER,
    Checkpoint,
    find_checkpoint,
    folder_of,
    latest_checkpoint,
    step_of,
)
from ctrsink.train.checkpoint.checkpoint import list_checkpoints as folders_of
from ctrsink.train.checkpoint.retention import Keeper, best_of, to_delete
from ctrsink.train.checkpoint.writer import CheckpointWriter
from ctrsink.train.engine import EngineState
from ctrsink.train.tensors import Source, Tensors
from tests.conftest import BUCKET
from tests.killed_saves import KEEP, make, numbers


def steps_in(run_dir: object) -> list[int]:
    return sorted(step_of(folder) for folder in folders_of(str(run_dir)))


def checkpoint(step: int, **metrics: float) -> Checkpoint:
    return Checkpoint(step, step, {"w": torch.full((3,), float(step))}, {}, {"head/plain": step}, "0" * 64, metrics=metrics)


keeps = st.builds(KeepSpec, last=st.none() | st.integers(1, 5), best=st.sampled_from([None, "auc", "gauc", "logloss"]))
steps = st.lists(st.integers(1, 30), unique=True, max_size=12)
scores = st.dictionaries(st.integers(1, 30), st.floats(0, 1) | st.just(float("nan")), max_size=12)


@given(steps, scores, keeps, st.sets(st.integers(1, 30), max_size=3))
def test_what_is_deleted_is_what_the_rule_does_not_keep(
    present: list[int], known: dict[int, float], keep: KeepSpec, protected: Collection[int]
) -> None:
    gone = to_delete(present, known, keep, protected)
    stay = set(present) - set(gone)
    assert gone == sorted(set(gone) & set(present))
    assert not set(gone) & set(protected)
    if keep.last is None:
        assert not gone
        return
    newest = sorted(present)[-keep.last :]
    assert set(newest) <= stay
    best = best_of(present, known, keep)
    assert stay == set(newest) | (set(protected) & set(present)) | ({best} - {None})
    # Applying it again deletes nothing: the best of what stays is the same one.
    assert to_delete(sorted(stay), known, keep, protected) == []


@given(steps, scores, keeps)
def test_the_best_has_no_better_and_no_earlier_equal(present: list[int], known: dict[int, float], keep: KeepSpec) -> None:
    values = {step: known[step] for step in present if known.get(step, float("nan")) == known.get(step)}
    best = best_of(present, known, keep)
    if keep.best is None or not values:
        assert best is None
        return
    assert best is not None
    extreme = (min if keep.best == "logloss" else max)(values.values())
    assert best == min(step for step, value in values.items() if value == extreme)


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path), KeepSpec(last=2, best="logloss"))
    for step, loss in ((10, 0.6), (20, 0.4), (30, 0.5), (40, 0.7), (50, 0.45)):
        writer.save(checkpoint(step, logloss=loss, auc=0.5))
        writer.wait()
    assert steps_in(tmp_path) == [20, 40, 50]
    best = kept.opened(json.loads((tmp_path / FOLDER / BEST).read_text()), BEST)
    assert best == {"step": 20, "metric": "logloss", "value": 0.4}
    assert find_checkpoint(str(tmp_path), "best").step == 20
    assert find_checkpoint(str(tmp_path)).step == 50
    # A run that goes on knows the scores of its earlier checkpoints from these themselves.
    again = CheckpointWriter(str(tmp_path), KeepSpec(last=1, best="logloss"))
    again.save(checkpoint(60))
    again.wait()
    assert steps_in(tmp_path) == [20, 60]
    assert again.seconds is not None


def test_everything_stays_unless_told_otherwise(tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path), KeepSpec())
    for step in range(1, 6):
        writer.save(checkpoint(step))
    writer.wait()
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
    with pytest.raises(InputError, match=r"knows no best checkpoint: train with train\.keep\.best"):
        find_checkpoint(str(tmp_path), "best")


def test_remains_are_cleared_and_others_are_left_alone(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        storage.write_bytes(storage.join(folder_of(str(tmp_path), step), "state.json"), b"{}")
    (tmp_path / FOLDER / "notes").mkdir()
    (tmp_path / FOLDER / "step-old").mkdir()
    writer = CheckpointWriter(str(tmp_path), KeepSpec(last=1))
    writer.save(checkpoint(20))
    writer.wait()
    assert steps_in(tmp_path) == [20, 30]
    assert {p.name for p in (tmp_path / FOLDER).iterdir()} >= {"notes", "step-old"}


def test_what_cannot_be_deleted_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = CheckpointWriter(str(tmp_path), KeepSpec(last=1))
    writer.save(checkpoint(1))
    writer.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "delete", refuse)
        writer.save(checkpoint(2))
        writer.wait()
    assert "older checkpoints of" in caplog.text
    assert steps_in(tmp_path) == [1, 2]
    Keeper(str(tmp_path), KeepSpec(last=1)).apply(2)
    assert steps_in(tmp_path) == [2]


def refuse(uri: str, content: object = None) -> None:
    raise StorageUnavailable(f"{uri}: cannot reach the S3 endpoint")


def test_training_goes_on_while_one_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda uri, content: (gate.wait(), write(uri, content)))
    writer = CheckpointWriter(str(tmp_path), KeepSpec())
    assert not writer.busy
    writer.save(checkpoint(1))
    assert writer.busy
    assert writer.seconds is None
    assert latest_checkpoint(str(tmp_path)) is None
    second = threading.Thread(target=writer.save, args=(checkpoint(2),))
    second.start()
    assert second.is_alive()  # waits for the first
    gate.set()
    second.join()
    writer.wait()
    assert not writer.busy
    assert steps_in(tmp_path) == [1, 2]


def test_an_outage_is_tolerated_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = CheckpointWriter(str(tmp_path), KeepSpec(), tolerate=2)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", refuse)
        for step in (1, 2, 3):
            writer.save(checkpoint(step))
        with pytest.raises(StorageUnavailable, match="cannot reach"):
            writer.save(checkpoint(4))
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2
    assert all(
        text.startswith("training goes on: the checkpoint of step ") and "cannot reach the S3 endpoint" in text for text in warned
    )
    # A save that succeeds makes up for those before.
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", refuse)
        writer = CheckpointWriter(str(tmp_path), KeepSpec(), tolerate=1)
        writer.save(checkpoint(5))
        writer._join()
    writer.save(checkpoint(6))
    writer.wait()
    assert steps_in(tmp_path) == [6]
    assert writer._failures == 0


def test_the_last_checkpoint_is_not_given_up_without_a_second_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(str(tmp_path), KeepSpec())
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", refuse)
        writer.save(checkpoint(1))
        with pytest.raises(StorageUnavailable):
            writer.wait()
        writer.save(checkpoint(2))
        writer._join()
    writer.wait()
    assert find_checkpoint(str(tmp_path)).step == 2


def test_what_failed_before_a_newer_checkpoint_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3 a large stage is saved by all ranks together, and a small one behind it in the background."""

    def engine(value: float, numbers: int) -> Any:
        source = Source(torch.Size([8]), lambda: torch.full((8,), value))
        state = EngineState(Tensors({f"w{n}": source for n in range(numbers)}), Tensors({}), {})
        model, tables = SimpleNamespace(large=()), SimpleNamespace(all={})
        return SimpleNamespace(zero_stage=3, trainable=("x",), model=model, tables=tables, given_state=lambda: state)

    def of(step: int, auc: float) -> Callable[[EngineState], Checkpoint]:
        return lambda state: replace(checkpoint(step, auc=auc), parameters=state.parameters, moments=state.moments)

    train = SimpleNamespace(keep=KeepSpec(last=3, best="auc"), checkpoint_format="portable")
    saver = saving.Saver(cast(Any, SimpleNamespace(run_dir=str(tmp_path), train=train)), Topology())
    monkeypatch.setattr(saving, "AT_ONCE", 64)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_shared", lambda run_dir, *rest: refuse(run_dir))
        saver.save(engine(1.0, 4), of(100, 0.6), None)
    small = engine(2.0, 1)
    saver.save(small, of(200, 0.9), None)
    saver.finish(small)
    assert steps_in(tmp_path) == [200]
    assert json.loads((tmp_path / "checkpoints/best.json").read_text())["step"] == 200


def test_an_error_of_ours_is_raised_at_once(tmp_path: Path) -> None:
    writer = CheckpointWriter(str(tmp_path), KeepSpec())
    wrong = checkpoint(1)
    wrong.parameters["w"] = wrong.parameters["w"].half()
    writer.save(wrong)
    with pytest.raises(TypeError, match=r"w is torch\.float16"):
        writer.save(checkpoint(2))


def test_a_full_disk_keeps_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(str(tmp_path), KeepSpec(), tolerate=0)
    writer.save(checkpoint(1))
    writer.wait()
    room, write = [250], os.pwrite

    def until_full(handle: int, content: Any, start: int) -> int:
        taken = min(len(content), room[0])
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= taken
        return write(handle, content[:taken], start)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", until_full)
        writer.save(checkpoint(2))
        with pytest.raises(RunError, match="no space left on device: free some space, or choose another place") as caught:
            writer.wait()
    assert "\n" not in str(caught.value)
    assert room == [0]
    assert [p.name for p in (tmp_path / FOLDER).iterdir()] == ["step-00000001"]
    assert find_checkpoint(str(tmp_path)).step == 1


END = """
import sys
from ctrsink.config.train import KeepSpec
from ctrsink.train.checkpoint.writer import CheckpointWriter
from ctrsink.train.engine import EngineState
from ctrsink.train.tensors import Source, Tensors
from tests.killed_saves import make
writer = CheckpointWriter(sys.argv[1], KeepSpec())
writer.save(make(10))
writer.save(make(20))
sys.exit("an error")
"""


def test_the_end_of_the_process_lets_a_save_finish(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "-c", END, str(tmp_path)]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr.strip().splitlines()[-1]) == (1, "an error")
    assert find_checkpoint(str(tmp_path)).step == 20


@pytest.mark.parametrize("remote", [False, True], ids=["disk", "s3"])
@pytest.mark.usefixtures("s3_server")
def test_killed_anywhere_at_most_one_interval_is_lost(
    tmp_path: Path, repository: Path, remote: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Between the bytes of each file, between the parts of an upload, around the marker, and in the deletions behind it."""
    base = f"s3://{BUCKET}/killed" if remote else str(tmp_path)
    command = [sys.executable, "-m", "tests.killed_saves", base]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    points = json.loads(ended.stdout)
    marked = points.index(f"behind step-00000030/{MARKER}")
    assert {"before step-00000030/moments.safetensors", "in the deletion of checkpoints/step-00000020"} <= set(points)
    assert ("before upload_part" if remote else "between two bytes") in points
    assert len(numbers(base, points)) >= 10
    for number in numbers(base, points):
        caplog.clear()
        run_dir = f"{base}/{number}"
        with caplog.at_level(logging.WARNING, "ctrsink.train"):
            found = latest_checkpoint(run_dir)
        assert found is not None
        # The last of the points before `marked` may be killed with the marker in place already, or not.
        assert found.step in ((30,) if number >= marked else (20, 30) if points[number].startswith("behind") else (20,)), points[
            number
        ]
        assert torch.equal(found.moments["w/exp_avg"], make(found.step).moments["w/exp_avg"])
        assert all("is incomplete: complete.json is missing" in record.getMessage() for record in caplog.records)
        # The run goes on, and nothing of it stays behind.
        writer = CheckpointWriter(run_dir, KEEP)
        writer.save(make(40))
        writer.wait()
        assert [step for step in (10, 15, 20, 30, 40) if storage.list_files(folder_of(run_dir, step))] == [10, 40]
        assert find_checkpoint(run_dir, "best").step == 10
