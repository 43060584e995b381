"""Jobs on a real cluster: started once, left running, found again, stopped. What runs there is a stand-in for training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_line import Result, call, call_process, refused
from tests.runs import run_tree
from tests.services.ray_cluster import RayCluster

PROGRAM = """
import os, sys, time
print("trains with", *sys.argv[1:], "beside", *sorted(os.listdir(".")), flush=True)
time.sleep(float(open("sleep").read()))
print("is done", flush=True)
sys.exit(int(open("code").read()))
"""
SUBMIT = ("submit", "--config", "work/run.yaml", "--working-dir", "work", "--submission-id")


@pytest.fixture
def work(tmp_path: Path, ray_cluster: RayCluster, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose `ctrsink` only says how it was called; the environment leads to the cluster.

    Ray reads once in a process how it is to say who it is, so each client is a process of its own.
    """
    for name, value in (ray_cluster.env() | {"RAY_API_SERVER_ADDRESS": ray_cluster.address}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work/ctrsink").mkdir(parents=True)
    for name, text in {"ctrsink/__init__.py": "", "ctrsink/__main__.py": PROGRAM, "sleep": "0", "code": "0", ".env": "S"}.items():
        (tmp_path / "work" / name).write_text(text)
    (tmp_path / "work/run.yaml").write_text(yaml.safe_dump(run_tree("s3://bucket/data", "s3://bucket/run")))
    return tmp_path / "work"


def told(*arguments: object) -> dict[str, Any]:
    result = call_process(*arguments, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out.splitlines()[-1])


def test_a_job_is_followed_and_its_log_found_again(work: Path) -> None:
    job = f"whole-{work.parent.name}"
    result = call_process(*SUBMIT, job, "train.log_every=7")
    assert result.code == 0, result.err
    assert "stays here (credentials): .env" in result.err
    line = "trains with train --config run.yaml train.log_every=7 beside code ctrsink run.yaml sleep"
    assert line in result.err
    assert "is done" in result.err
    again = call_process("jobs", "logs", job)
    assert (again.code, line in again.out) == (0, True)
    found = told("jobs", "status", job)
    assert (found["status"], found["run_dir"]) == ("SUCCEEDED", "s3://bucket/run")
    table = call_process("jobs", "list").out.splitlines()
    assert table[0].split() == ["job", "status", "started", "ended", "run_dir"]
    assert [job, "SUCCEEDED"] in [row.split()[:2] for row in table]
    assert told("jobs", "stop", job) == {"job": job, "status": "had ended: SUCCEEDED"}
    refused(call_process("jobs", "status", "nobody"), "has no job nobody", "ctrsink jobs list --address http://")


def test_the_same_work_of_one_id_is_started_once_and_other_work_is_refused(work: Path) -> None:
    job = f"once-{work.parent.name}"
    (work / "code").write_text("3")
    ended = f"error: job {job} ended FAILED: Job entrypoint command failed with exit code 3"
    first = call_process(*SUBMIT, job)
    assert (first.code, first.err.splitlines()[-1]) == (1, ended)
    second = call_process(*SUBMIT, job)
    assert (second.code, second.err.splitlines()[-1]) == (1, ended)
    assert "is there with this work, FAILED: nothing is started" in second.err
    refused(call_process(*SUBMIT, job, "seed=1"), f"job {job}", "was started with other files or other arguments")
    (work / "code").write_text("0")
    refused(call_process(*SUBMIT, job), "give another --submission-id, or the same work")


def test_a_job_goes_on_without_its_client_and_can_be_stopped(work: Path) -> None:
    (work / "sleep").write_text("300")
    job = f"left-{work.parent.name}"
    client = subprocess.Popen([sys.executable, "-m", "ctrsink", *SUBMIT, job], stderr=subprocess.PIPE, text=True)
    assert client.stderr is not None
    deadline = time.monotonic() + 90
    while "trains with" not in (line := client.stderr.readline()):
        assert line, "the client ended"
        assert time.monotonic() < deadline
    client.send_signal(signal.SIGINT)
    _, left = client.communicate(timeout=120)
    assert client.returncode == 130, left
    assert f"job {job} goes on without this terminal" in left
    assert f"ctrsink jobs logs --follow {job} --address http://" in left
    assert f"ctrsink jobs stop {job} --address http://" in left
    assert told("jobs", "status", job)["status"] == "RUNNING"

    assert told(*SUBMIT, job, "--detach") == {"job": job, "run_dir": "s3://bucket/run"}
    assert told("jobs", "stop", job) == {"job": job, "status": "asked to end"}
    followed = call_process("jobs", "logs", job, "--follow")
    assert followed.code == 1
    assert f"error: job {job} ended STOPPED" in followed.err


@pytest.mark.parametrize("name", ["../version", "a/b", "", ".x", "a?b", "x" * 101, "a\nb"])
def test_an_id_that_would_lead_elsewhere_is_refused(name: str) -> None:
    for verb in ("status", "logs", "stop"):
        refused(call("jobs", verb, name, "--address", "http://127.0.0.1:9"), "is no id of a job")


def without_token(*arguments: object) -> Result:
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-m", "ctrsink", *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_without_the_token_nothing_is_told(work: Path) -> None:
    assert work.is_dir()
    refused(without_token("jobs", "list"), "did not list its jobs")
