"""Two processes never train one run: the second is told who does."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from ctrsink.errors import InputError
from ctrsink.runtime import presence
from ctrsink.runtime.presence import Presence, require_nobody
from ctrsink.train.rundir import PRESENCE_NAME, request_stop
from tests.command_line import call, refused
from tests.runs import prepared_data, train_process


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "PERIOD_S", 0.1)


@pytest.mark.usefixtures("quick")
def test_somebody_is_there_until_he_leaves(tmp_path: Path) -> None:
    one = Presence(str(tmp_path))
    while not (tmp_path / PRESENCE_NAME).exists():
        time.sleep(0.01)
    with pytest.raises(
        InputError, match=rf"is being trained by process {os.getpid()} on host .*: end that with `ctrsink stop --run"
    ):
        require_nobody(str(tmp_path))
    one.close()
    require_nobody(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("word", [json.dumps({"host": "h", "process": 1, "beat": 7}), "half of a wor", "[]"])
def test_the_word_of_somebody_who_died_holds_nobody_up_for_long(tmp_path: Path, word: str) -> None:
    (tmp_path / PRESENCE_NAME).write_text(word)
    require_nobody(str(tmp_path))


@pytest.mark.usefixtures("quick")
def test_a_request_to_stop_is_seen(tmp_path: Path) -> None:
    one = Presence(str(tmp_path))
    assert one.stop_reason() is None
    request_stop(str(tmp_path), "enough")
    until = time.monotonic() + 10
    while one.stop_reason() is None and time.monotonic() < until:
        time.sleep(0.01)
    one.close()
    assert one.stop_reason() == "enough"


def test_a_run_is_resumed_by_nobody_while_it_trains_and_by_anybody_after_it_was_killed(tmp_path: Path) -> None:
    data = prepared_data(str(tmp_path / "set"))
    process = train_process(tmp_path, data)
    again = ["train", "--config", tmp_path / "run.yaml", "--resume"]
    refused(call(*again), f"is being trained by process {process.pid} on host")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert call(*again, "--stop-after", 1).code == 0
