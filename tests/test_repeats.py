"""A failure that comes back in every attempt ends the run, however many ranks it is of."""

from pathlib import Path

import pytest

from ctrsink.errors import InputError, PeerLost, RunError, StorageUnavailable
from ctrsink.run.repeats import TIMES, forget, given_up, record


@pytest.mark.parametrize("world", [1, 4])
def test_the_third_attempt_that_fails_alike_is_the_last(tmp_path: Path, world: int) -> None:
    for attempt in range(1, TIMES + 1):
        assert given_up(str(tmp_path)) is None
        for rank in range(world):
            record(str(tmp_path), rank, RunError(f"rank {rank}, step 7, stage all: out of memory"))
        told = given_up(str(tmp_path))
        assert (told is not None) == (attempt == TIMES)
    assert told == f"rank 0, step 7, stage all: out of memory ({TIMES} times)"
    forget(str(tmp_path))
    assert given_up(str(tmp_path)) is None


def test_what_passes_or_moves_on_is_not_counted(tmp_path: Path) -> None:
    for step in range(5):
        record(str(tmp_path), 0, InputError(f"rank 0, step {step}: damaged"))
        record(str(tmp_path), 1, PeerLost("rank 1, step 7: the other one is gone"))
        record(str(tmp_path), 2, StorageUnavailable("s3://bucket does not answer"))
    assert given_up(str(tmp_path)) is None


def test_what_passes_between_does_not_begin_the_count_anew_and_another_failure_does(tmp_path: Path) -> None:
    for error in (RunError("step 3"), RunError("step 3"), PeerLost("step 3"), InputError("step 4"), InputError("step 4")):
        record(str(tmp_path), 0, error)
        assert given_up(str(tmp_path)) is None
    record(str(tmp_path), 0, StorageUnavailable("away"))
    record(str(tmp_path), 0, InputError("step 4"))
    assert given_up(str(tmp_path)) == "step 4 (3 times)"


def test_a_run_that_has_come_further_since_is_not_given_up(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        record(str(tmp_path), 0, RunError("the disk is full"))
        assert given_up(str(tmp_path)) is None
    for _ in range(TIMES - 1):
        record(str(tmp_path), 0, RunError("the disk is full"))
    assert given_up(str(tmp_path)) == f"the disk is full ({TIMES} times)"


def test_a_failure_that_cannot_be_counted_hides_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "failures").write_text("a file where the folder should be")
    record(str(tmp_path), 0, RunError("first"))
    assert "the failure is not counted" in caplog.text
