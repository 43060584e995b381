"""A run that makes no step for a minute says so, and what it waits for; a minute is short here."""

import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import placement_group, remove_placement_group

from ctrsink.config import parse_run
from ctrsink.config.train import RuntimeSpec
from ctrsink.dataset.reader import Dataset
from ctrsink.runtime import places, stalls
from ctrsink.runtime.ray_train import connect
from ctrsink.runtime.stalls import Stalls
from ctrsink.runtime.start import start
from tests.runs import prepared_data, run_tree

pytestmark = pytest.mark.usefixtures("heard")


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "no step for" in record.getMessage()]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stalls, "PATIENCE_S", 0.3)


def test_it_is_told_once_in_a_while_and_not_after_a_step(caplog: pytest.LogCaptureFixture) -> None:
    watched = Stalls("the beginning")
    time.sleep(0.5)
    for step in range(4):
        watched.doing(step, lambda: "something quick")
        time.sleep(0.1)
    watched.doing(3, lambda: "another rank")
    time.sleep(1.1)
    watched.close()
    told = [message.partition(": waiting for ")[2] for message in messages(caplog)]
    assert told == ["the beginning", "another rank", "another rank"]
    time.sleep(0.4)
    assert len(messages(caplog)) == 3


def test_a_run_says_that_it_waits_for_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load = Dataset._load

    def slowly(self: Dataset, *shard: Any) -> object:
        time.sleep(1)
        return load(self, *shard)

    monkeypatch.setattr(Dataset, "_load", slowly)
    data = prepared_data(str(tmp_path / "data"))
    spec = parse_run(run_tree(data, str(tmp_path / "run"), stages=run_tree(data, "")["stages"][:1]), "test")
    start(spec, stop_after=1)
    assert any("waiting for the data of shards/0" in message and "stage align" in message for message in messages(caplog))


def test_workers_without_a_place_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    connect(None, 1)
    try:
        wanted, few = RuntimeSpec(kind="ray", workers=2, cpus_per_worker=3), RuntimeSpec(kind="ray", workers=1)
        assert places.missing(wanted) == "2 workers need 6 CPUs, the cluster has 1"
        waiting = places.Waiting(wanted)
        for _ in range(5):
            waiting.look()
        assert [message.partition(":")[0] for message in messages(caplog)] == [f"no step for {s} s" for s in (60, 120, 240)]
        assert "waiting for: 2 workers need 6 CPUs, the cluster has 1" in caplog.text
        caplog.clear()
        taken = placement_group([{"CPU": 1}])
        ray.get(taken.ready(), timeout=30)
        waiting = places.Waiting(few)
        waiting.look()
        waiting.look()
        assert messages(caplog) == []
        asked = placement_group([{"CPU": 1}])
        waiting.look()
        waiting.look()
        assert [message.partition("waiting for: ")[2] for message in messages(caplog)] == ["1 CPUs to be free"]
        remove_placement_group(asked)
        remove_placement_group(taken)
    finally:
        ray.shutdown()
