"""Two processes never train one run: the second is told who does."""

import json
import os
import signal
import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from ctrsink.errors import InputError
from ctrsink.run import presence
from ctrsink.run.folder import PRESENCE_NAME
from ctrsink.run.presence import held
from tests.command_line import call, refused
from tests.runs import prepared_data, train_process


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "PERIOD_S", 0.1)
    monkeypatch.setattr(presence, "SETTLE_S", 0.5)


@pytest.mark.usefixtures("quick")
def test_a_run_is_held_by_one_until_he_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = rf"is being trained by process {os.getpid()} on host .*: end that with `ctrsink stop --run {tmp_path}`, and resume"
    with held(str(tmp_path)):
        monkeypatch.setattr(presence, "PATIENCE", 300)  # a slow disk is no death
        with pytest.raises(InputError, match=said), held(str(tmp_path)):
            pass
        assert (tmp_path / PRESENCE_NAME).exists(), "he who was refused takes nothing away"
    assert list(tmp_path.iterdir()) == []
    with held(str(tmp_path)):
        pass


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("sign", [json.dumps({"host": "h", "process": 1, "token": "x", "beat": 7}), "half of a sig", "[]"])
def test_one_who_died_holds_nobody_up_for_long(tmp_path: Path, sign: str) -> None:
    (tmp_path / PRESENCE_NAME).write_text(sign)
    with held(str(tmp_path)):
        assert json.loads((tmp_path / PRESENCE_NAME).read_text())["process"] == os.getpid()


@pytest.mark.usefixtures("quick")
def test_of_many_that_wait_for_the_same_death_one_goes_on(tmp_path: Path) -> None:
    (tmp_path / PRESENCE_NAME).write_text(json.dumps({"host": "h", "process": 1, "token": "x", "beat": 7}))
    going, refusals, all_said = [], [], threading.Event()

    def take(number: int) -> None:
        try:
            with held(str(tmp_path)):
                going.append(number)
                all_said.wait(20)
        except InputError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 20
    while len(going) + len(refusals) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    all_said.set()
    for thread in threads:
        thread.join()
    assert len(going) == 1
    assert len(refusals) == 4


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def interrupts(request: pytest.FixtureRequest) -> Generator[None, None, None]:
    """A shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    assert signal.signal(signal.SIGINT, before) is request.param


@pytest.mark.usefixtures("quick", "interrupts")
def test_one_who_was_taken_for_dead_and_lives_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = json.dumps({"host": "elsewhere", "process": 1, "token": "x", "beat": 7})

    def train() -> None:
        with held(str(tmp_path)):
            for _ in range(400):  # a beat that is under way writes over it once
                (tmp_path / PRESENCE_NAME).write_text(other)
                time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        train()
    assert "was taken over by process 1 on host elsewhere" in caplog.text
    assert (tmp_path / PRESENCE_NAME).exists(), "it is the other's now"


def test_a_run_is_resumed_by_nobody_while_it_trains_and_by_anybody_after_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepared_data(str(tmp_path / "set"))
    process = train_process(tmp_path, data)
    again = ["train", "--config", tmp_path / "run.yaml", "--resume"]
    refused(call(*again), f"is being trained by process {process.pid} on host")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    monkeypatch.setattr(presence, "PERIOD_S", 0.1)
    assert call(*again, "--stop-after", 1).code == 0


@pytest.mark.usefixtures("quick")
def test_in_the_background_a_run_goes_on_at_another_s_interrupt(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held(str(tmp_path)):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
