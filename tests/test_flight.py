"""A collective hangs: what each rank did last is left behind, and names the rank that did not come."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from ctrsink.config.train import RuntimeSpec
from ctrsink.errors import PeerLost, RunError
from ctrsink.run.folder import FLIGHT_NAME
from ctrsink.runtime import flight
from ctrsink.runtime.ray_train import told_of
from tests.flight_ranks import TIMEOUT_S
from tests.rank_processes import run_ranks

TWO = RuntimeSpec(kind="ray", workers=2)


def record(*reached: tuple[str, int], name: str = "nccl:all_reduce") -> dict[str, Any]:
    """What torch writes of a rank that came to so many collectives of each group, as far as it is looked at."""
    return {
        "version": "2.10",
        "entries": [
            {"process_group": (str(i), group), "collective_seq_id": number, "profiling_name": name, "is_p2p": False}
            for i, (group, count) in enumerate(reached)
            for number in range(1, count + 1)
        ],
    }


def test_the_rank_that_did_not_come_is_named_by_what_real_ranks_left(tmp_path: Path) -> None:
    place = tmp_path / "run" / FLIGHT_NAME
    (waited,), (away,) = run_ranks(
        ["-m", "tests.flight_ranks"], 2, [str(tmp_path / "meet"), str(place)], Path(__file__).parent.parent, 60 + TIMEOUT_S
    )
    assert waited["failed"] is not None
    assert away["failed"] is None
    assert sorted(path.name for path in place.iterdir()) == ["rank-0", "rank-1"]
    told = flight.take(place)
    line = "gloo:all_reduce number 3 of group default_pg waited for rank 1 (came to 2)"
    assert told == f"{line} (flight recorder, {place}/last-rank-*)"
    assert sorted(path.name for path in place.iterdir()) == ["last-rank-0", "last-rank-1"]
    assert flight.take(place) is None


def test_every_group_tells_of_its_own_and_a_few_are_enough() -> None:
    assert flight.waited_for({}) is None
    assert flight.waited_for({0: record(("a", 3)), 1: record(("a", 3))}) is None
    found = flight.waited_for({0: record(("a", 5), ("b", 7)), 3: record(("a", 5), ("b", 6)), 2: record(("a", 4))})
    assert found == (
        "nccl:all_reduce number 5 of group a waited for rank 2 (came to 4); "
        "nccl:all_reduce number 7 of group b waited for rank 2 (came to 0), 3 (came to 6)"
    )
    many = flight.waited_for({0: record(("a", 2)), **{rank: record(("a", 1)) for rank in range(1, 64)}})
    assert many is not None
    assert many.endswith("8 (came to 1) and 55 more")


def test_a_file_that_is_damaged_or_holds_more_than_values_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Shell:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "rank-0").write_bytes(pickle.dumps(record(("a", 2))))
    (tmp_path / "rank-1").write_bytes(pickle.dumps(record(("a", 1))))
    (tmp_path / "rank-2").write_bytes(pickle.dumps({"entries": [Shell()]}))
    (tmp_path / "rank-3").write_bytes(pickle.dumps(record(("a", 1)))[:-9])
    (tmp_path / "rank-4").write_bytes(b"")
    told = flight.take(tmp_path)
    assert told is not None
    assert told.startswith("nccl:all_reduce number 2 of group a waited for rank 1 (came to 1) (flight recorder")
    assert not (tmp_path / "ran").exists()
    assert [f"rank-{rank}: not what torch's" in caplog.text for rank in range(5)] == [False, False, True, True, True]


def test_the_recorder_is_on_and_what_the_user_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert flight.recording(flight.place_of(str(tmp_path))) == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/flight/rank-",
    }
    flight.leave(0)  # nothing is on in this process
    assert not (tmp_path / "flight").exists()
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    assert flight.recording(tmp_path)["TORCH_FR_BUFFER_SIZE"] == "7"
    assert flight.place_of("s3://bucket/a") != flight.place_of("s3://bucket/b")
    assert flight.place_of("s3://bucket/a").parent.is_dir()


def test_an_aborted_worker_is_told_with_whom_it_waited_for_and_a_failure_of_its_own_is_not(tmp_path: Path) -> None:
    def left() -> None:
        for rank, count in ((0, 2), (1, 1)):
            (tmp_path / f"rank-{rank}").write_bytes(pickle.dumps(record(("a", count))))

    left()
    aborted = told_of({0: ConnectionError("The worker died unexpectedly")}, tmp_path, TWO)
    assert str(aborted).startswith("worker 0 failed: ConnectionError: The worker died unexpectedly; nccl:all_reduce number 2")
    left()
    assert "waited for rank 1" in str(told_of({0: PeerLost("gone"), 1: PeerLost("gone")}, tmp_path, TWO))
    left()
    assert (
        str(told_of({0: PeerLost("gone"), 1: RunError("out of memory")}, tmp_path, TWO))
        == "worker 1 failed: RunError: out of memory"
    )


def test_a_rank_that_left_nothing_is_named_where_another_did(tmp_path: Path) -> None:
    assert flight.take(tmp_path, 2) is None
    (tmp_path / "rank-0").write_bytes(pickle.dumps(record(("a", 2))))
    assert flight.take(tmp_path, 3) == f"rank 1, 2 left no record (flight recorder, {tmp_path}/last-rank-*)"
    (tmp_path / "rank-0").write_bytes(pickle.dumps(record(("a", 2))))
    assert flight.take(tmp_path) is None
