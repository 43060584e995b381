"""metrics.jsonl is appended to; whatever cuts a write off, no row is lost and none is there twice after a resume."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.local.seaweed import SeaweedServer
from ctrsink import storage
from ctrsink.config import RunSpec
from ctrsink.errors import InputError, RunError
from ctrsink.train.observe import telemetry as module
from ctrsink.train.observe.telemetry import Telemetry, read_metrics
from tests.conftest import BUCKET
from tests.test_telemetry import row, spec_of


def write(spec: RunSpec, begin: int, rows: list[int]) -> None:
    telemetry = Telemetry(spec, begin)
    for step in rows:
        telemetry.add(row(step))
        telemetry.flush().result()
    telemetry.close(finished=False)


def steps(run_dir: Any) -> list[int]:
    return [line["step"] for line in read_metrics(str(run_dir))]


def test_a_flush_writes_the_rows_since_the_last_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serialised and written once each: the work does not grow with the file."""
    appended: list[tuple[bytes, int]] = []
    append = storage.append
    monkeypatch.setattr(storage, "append", lambda uri, content, at: appended.append((content, at)) or append(uri, content, at))
    telemetry = Telemetry(spec_of(tmp_path), 0)
    for step in range(1, 6):
        telemetry.add(row(step))
        telemetry.flush().result()
    telemetry.close(finished=True)
    content = (tmp_path / "metrics.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert appended == [(lines[i], sum(map(len, lines[:i]))) for i in range(1, 5)]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.integers(0, 12), st.integers(0, 60))
def test_a_resume_cuts_what_lies_behind_its_step_wherever_the_file_was_cut_off(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[int], begin: int, lost: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    written = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    write(spec_of(folder), 0, written)
    whole = (folder / "metrics.jsonl").read_bytes()
    cut = whole[: len(whole) - lost]
    (folder / "metrics.jsonl").write_bytes(cut)
    kept = written[: cut.count(b"\n")]
    assert steps(folder) == kept
    write(spec_of(folder), begin, [begin + 1, begin + 3])
    assert steps(folder) == [step for step in kept if step <= begin] + [begin + 1, begin + 3]


def test_a_resume_that_adds_nothing_cuts_all_the_same_and_a_run_without_a_step_leaves_nothing(tmp_path: Path) -> None:
    write(spec_of(tmp_path), 0, [])
    assert not (tmp_path / "metrics.jsonl").exists()
    write(spec_of(tmp_path), 0, [1, 2, 3])
    write(spec_of(tmp_path), 2, [])
    assert steps(tmp_path) == [1, 2]
    write(spec_of(tmp_path), 0, [1])
    assert steps(tmp_path) == [1]


def test_rows_that_could_not_be_written_come_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    """A disk that becomes full in the middle of a row: what it took of it is written over."""
    telemetry, append = Telemetry(spec_of(tmp_path), 0), storage.append

    def full(uri: str, content: bytes, at: int) -> None:
        append(uri, content[:7], at)
        raise RunError("no space left on device")

    telemetry.add(row(1))
    telemetry.flush().result()
    monkeypatch.setattr(storage, "append", full)
    telemetry.add(row(2))
    telemetry.flush().result()
    assert "no space left on device" in heard.text
    assert steps(tmp_path) == [1]
    monkeypatch.setattr(storage, "append", append)
    telemetry.add(row(3))
    telemetry.close(finished=True)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_file_that_somebody_shortened_is_not_filled_with_zeros(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    telemetry, path = Telemetry(spec_of(tmp_path), 0), tmp_path / "metrics.jsonl"
    telemetry.add(row(1))
    telemetry.flush().result()
    path.write_bytes(b"")
    telemetry.add(row(2))
    telemetry.close(finished=True)
    assert path.read_bytes() == b""
    assert "metrics.jsonl has 0 bytes of the" in heard.text
    with pytest.raises(InputError, match="somebody else changed it"):
        storage.append(str(path), b"more", 3)


def test_on_s3_the_file_is_whole_and_only_what_is_new_is_uploaded(
    s3_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = f"s3://{BUCKET}/metrics-file/run"
    spec = spec_of(Path("unused")).model_copy(update={"run_dir": run_dir})
    uploads: list[str] = []
    upload = storage.upload_dir
    monkeypatch.setattr(storage, "upload_dir", lambda source, uri: uploads.append(uri) or upload(source, uri))
    telemetry = Telemetry(spec, 0)
    for step in range(1, 5):
        telemetry.add(row(step))
        if step % 2 == 0:
            telemetry.flush().result()
            assert steps(run_dir) == list(range(1, step + 1))
    telemetry.flush().result()  # as at a checkpoint, with nothing new
    telemetry.close(finished=False)
    assert uploads == [run_dir] * 2
    assert storage.list_files(f"{run_dir}/tensorboard")
    write(spec, 3, [5])
    assert steps(run_dir) == [1, 2, 3, 5]


def test_uploads_take_a_twentieth_of_the_time_at_most(s3_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = f"s3://{BUCKET}/metrics-file/slow"
    upload, flushes = storage.upload_dir, []
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(source: str, uri: str) -> None:
        upload(source, uri)
        now[0] += 10

    monkeypatch.setattr(storage, "upload_dir", slow)
    telemetry = Telemetry(spec_of(Path("unused")).model_copy(update={"run_dir": run_dir}), 0)
    for step in range(1, 100):
        now[0] += 10
        before = telemetry._flush
        telemetry.add(row(step))
        telemetry._flush.result()
        if telemetry._flush is not before:
            flushes.append(step)
    telemetry.close(finished=True)
    assert flushes[0] == 7  # a minute after the start, then 200 s after each
    assert {b - a for a, b in pairwise(flushes)} == {20}
    assert steps(run_dir) == list(range(1, 100))
