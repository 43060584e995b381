"""A cluster that nobody answers for is told of in seconds, and a run that never made a step leaves no folder behind."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ctrsink import storage
from ctrsink.errors import RunError
from ctrsink.runtime import start as starting
from tests.command_line import call, refused
from tests.runs import prepared_data, run_tree


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("reach") / "set"))


@pytest.fixture
def config(data: str, tmp_path: Path) -> Path:
    tree = run_tree(data, str(tmp_path / "run"), runtime={"kind": "ray", "workers": 2})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


@pytest.fixture(params=["closed", "silent", "other"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where no cluster answers: nobody listens, somebody listens and says nothing, somebody is no Ray."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if request.param != "closed":
            listening.listen()
        if request.param == "other":
            threading.Thread(target=_be_another, args=(listening,), daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def _be_another(listening: socket.socket) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("how", ["environment", "configuration"])
def test_a_cluster_that_does_not_answer_is_one_line_and_no_run(
    config: Path, address: str, scheme: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = scheme + address
    if how == "environment":
        monkeypatch.setenv("RAY_ADDRESS", given)
    changes = [f"runtime.address={given}"] if how == "configuration" else []
    named = "runtime.address" if how == "configuration" else "RAY_ADDRESS"
    began = time.monotonic()
    refused(call("train", "--config", config, *changes), f"{named} {given}: ", "start the cluster there, or correct the address")
    assert time.monotonic() - began < 30  # a machine with other work needs some to import; nobody answered in 700
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize("given", ["nowhere", "http://127.0.0.1:8265", "127.0.0.1:port", "me@127.0.0.1:6379", "[::1:6379"])
def test_what_is_no_address_of_a_cluster_is_said_to_be_none(config: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    refused(call("train", "--config", config), f"RAY_ADDRESS '{given}' is no address of a Ray cluster: give HOST:6379")
    assert not (config.parent / "run").exists()


def test_a_cluster_that_cannot_be_started_here_is_one_line_and_no_run(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = config.parent / "/".join(["a-very-long-name-for-a-folder"] * 5)
    long.mkdir(parents=True)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    refused(call("train", "--config", config), "cannot start a Ray cluster on this machine (", "RAY_TMPDIR is a short path")
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RunError("no worker came"), KeyboardInterrupt()])
def test_whatever_ends_a_new_run_before_its_first_step_leaves_no_folder(
    config: Path, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        (config.parent / "run" / "ray").mkdir()
        raise failure

    monkeypatch.setattr(starting, "_train", fail)
    assert call("train", "--config", config).code in (1, 130)
    assert not (config.parent / "run").exists()


def test_one_who_lost_the_folder_does_not_take_it_from_the_other(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config.parent / "run"

    def fail(*args: object) -> None:
        while not json.loads((run / "held-by.json").read_text() or "{}").get("beat"):
            time.sleep(0.01)  # the first sign of life, which comes at once, would write over the other's
        (run / "held-by.json").write_text('{"host": "h", "process": 1, "token": "another", "beat": 1}')
        raise RunError("no worker came")

    monkeypatch.setattr(starting, "_train", fail)
    assert call("train", "--config", config).code == 1
    assert (run / "config.yaml").exists()


def test_a_claim_that_is_cut_off_is_taken_back(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = storage.write_bytes

    def full(uri: str, content: bytes) -> None:
        if uri.endswith("data.sha256"):
            raise RunError(f"{uri}: no space left on device")
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", full)
    assert call("train", "--config", config).code == 1
    assert not (config.parent / "run").exists()
    assert os.listdir(config.parent) == ["run.yaml"]  # noqa: PTH208
