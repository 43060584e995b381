"""A run whose storage goes away while it trains: it goes on, and nothing is missing afterwards."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ctrsink import storage
from ctrsink.config import parse_run
from ctrsink.errors import StorageUnavailable
from ctrsink.runtime.start import start
from ctrsink.train.checkpoint.checkpoint import MARKER, find_checkpoint, list_checkpoints
from ctrsink.train.observe.telemetry import read_metrics
from tests.conftest import BUCKET
from tests.runs import prepared_data, run_tree
from tests.services.faulty_proxy import Fault, FaultyProxy


@contextmanager
def away(proxy: FaultyProxy, run_dir: str, seconds: float) -> Iterator[list[float]]:
    """The storage refuses everything for so long, from the moment when the run has its first whole checkpoint."""
    when: list[float] = []

    def break_it() -> None:
        while not any(storage.exists(f"{folder}/{MARKER}") for folder in list_checkpoints(run_dir)):
            time.sleep(0.05)
        proxy.plant(Fault("refuse"))
        when.append(time.monotonic())
        time.sleep(seconds)
        proxy.plant()
        when.append(time.monotonic())

    thread = threading.Thread(target=break_it)
    thread.start()
    try:
        yield when
    finally:
        thread.join()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", [5.0, pytest.param(120.0, marks=pytest.mark.slow)])
def test_a_run_goes_on_while_its_storage_is_away(
    proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Not longer than a request is repeated: the last checkpoint and every row are there, and the losses are the same."""
    if seconds > 5:
        monkeypatch.delenv("CTRSINK_STORAGE_DEADLINE_S")
    data, run_dir = prepared_data(str(tmp_path / "data")), f"s3://{BUCKET}/outages/goes-on-{seconds:g}"
    spec = parse_run(run_tree(data, run_dir, train={"checkpoint_every": 4}), "test")
    with away(proxy, run_dir, seconds) as when:
        result = start(spec)
    assert result["finished"]
    assert len(when) == 2
    assert find_checkpoint(run_dir).step == 20
    assert [row["step"] for row in read_metrics(run_dir)] == list(range(1, 21))
    straight = str(tmp_path / "straight")
    start(parse_run(run_tree(data, straight), "test"))
    assert [row["loss"] for row in read_metrics(run_dir)] == [row["loss"] for row in read_metrics(straight)]


def test_a_storage_that_stays_away_ends_the_run_and_it_goes_on_later(
    proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run_dir = prepared_data(str(tmp_path / "data")), f"s3://{BUCKET}/outages/stays-away"
    monkeypatch.setenv("CTRSINK_STORAGE_DEADLINE_S", "1")
    spec = parse_run(run_tree(data, run_dir, train={"checkpoint_every": 2}), "test")
    with away(proxy, run_dir, 25.0), pytest.raises(StorageUnavailable):
        start(spec)
    found = find_checkpoint(run_dir).step
    assert 2 <= found < 20
    assert start(spec, resume=True)["finished"]
