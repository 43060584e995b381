"""Real hosts that fail: the main job over two of them, one killed and replaced, one cut off and joined again."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.host_failure import Job, recover
from cluster.local.__main__ import main
from cluster.local.hosts import BUCKET, Hosts
from cluster.local.ray_node import RAY
from ctrsink.config import parse_run
from ctrsink.config.load import merge
from ctrsink.runtime.start import start
from ctrsink.train.observe.telemetry import read_metrics
from tests.runs import prepared_data, run_tree

pytestmark = [pytest.mark.root, pytest.mark.slow]

NAME = "pytest"
# Dropout is seeded by rank. Many micro-batches, so that a step lasts long enough to be hit.
SHAPE: dict[str, Any] = {
    "model": {"backbone": {"config": {"attention_dropout": 0.0}}},
    "train": {"batch_size": 64, "micro_batch_size": 2, "checkpoint_every": 4},
}
ON_HOSTS: dict[str, Any] = {"runtime": {"kind": "ray", "workers": 2, "max_failures": 3}, "train": {"zero_stage": 2}}


def on_head(hosts: Hosts, program: str) -> str:
    """What a Python program prints there."""
    return Job(hosts, [sys.executable, "-c", program], hosts.folder).result(120)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("data")), users=90)


@pytest.fixture(scope="module")
def alone(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run in one process without Ray."""
    run_dir = str(tmp_path_factory.mktemp("alone") / "run")
    start(parse_run(run_tree(data, run_dir, **SHAPE), "test"))
    return [row["loss"] for row in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def hosts(data: str, repository: Path) -> Iterator[Hosts]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(repository))
        started = Hosts.up(NAME, hosts=2, cpus=1)
        try:
            on_head(started, f"from ctrsink import storage; storage.upload_dir({data!r}, 's3://{BUCKET}/data')")
            yield started
        finally:
            started.down()


def submitted(hosts: Hosts, folder: Path, name: str, **changes: Any) -> Job:
    tree = run_tree(f"s3://{BUCKET}/data", f"s3://{BUCKET}/{name}", **merge(merge(SHAPE, ON_HOSTS), changes))
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return Job(
        hosts,
        [*RAY, "job", "submit", "--working-dir=.", "--", "python", "-m", "ctrsink", "train", "--config", "run.yaml"],
        folder,
    )


def require_same_losses(hosts: Hosts, name: str, alone: list[float]) -> None:
    read = f"import json; from ctrsink.train.observe.telemetry import read_metrics as r; print(json.dumps(r('s3://{BUCKET}/{name}')))"
    rows = json.loads(on_head(hosts, read).splitlines()[-1])
    assert [row["step"] for row in rows] == list(range(1, len(alone) + 1))
    torch.testing.assert_close([row["loss"] for row in rows], alone, atol=1e-5, rtol=0)


def test_run_spans_two_hosts(hosts: Hosts, tmp_path: Path, alone: list[float]) -> None:
    output = submitted(hosts, tmp_path, "whole").result(300)
    assert "succeeded" in output
    workers = {address for host, address in hosts.addresses().items() if host.startswith("host") and f"ip={address}" in output}
    assert len(workers) == 2, output
    require_same_losses(hosts, "whole", alone)


@pytest.mark.parametrize(("failure", "host"), [("cut", "host1"), ("kill", "host2")])
def test_run_goes_on_after_a_host_failed(hosts: Hosts, tmp_path: Path, alone: list[float], failure: str, host: str) -> None:
    job = submitted(hosts, tmp_path, failure)
    recovery = recover(hosts, job, failure, host, at=6)
    print(recovery)
    job.result(300)
    assert recovery.resumed_at > 1
    assert recovery.resumed_at % 4 == 1, "it went on with the step behind a checkpoint"
    require_same_losses(hosts, failure, alone)


def announced_and_saved(lines: list[str]) -> bool:
    """Whether a checkpoint was finished after the loss of a host was noticed."""
    noticed = next((i for i, line in enumerate(lines) if "is announced: a checkpoint is made" in line), len(lines))
    return any("INFO checkpoint s3://" in line for line in lines[noticed:])


def test_announced_loss_of_a_host_is_no_failure(hosts: Hosts, data: str, tmp_path: Path) -> None:
    """Not one failure is allowed, checkpoints are far apart, and the host really goes; the last one left does the rest."""
    stages = run_tree(data, "")["stages"]
    stages[1]["steps"] = 242
    reference = str(tmp_path / "reference")
    start(parse_run(run_tree(data, reference, **merge(SHAPE, {"stages": stages})), "test"))
    runtime = {"workers": {"min": 1, "max": 2}, "max_failures": 0, "max_preemptions": 3, "resize_every_s": 600}
    job = submitted(hosts, tmp_path, "announced", runtime=runtime, train={"checkpoint_every": 1000}, stages=stages)
    job.wait(lambda: max(job.steps(), default=0) >= 10, 240)
    host = max(host for host in hosts.addresses() if host.startswith("host") and hosts.network.alive(host))
    hosts.announce(host, 15)
    deadline = time.monotonic() + 16
    job.wait(lambda: announced_and_saved(job.lines), 60)
    time.sleep(max(0.0, deadline - time.monotonic()))  # for Ray a host that goes before its time has failed
    hosts.kill(host)
    output = job.result(300)
    continued = re.findall(r"continuing from the checkpoint of step (\d+) with (\d) workers", output)
    assert continued, output
    assert 10 <= int(continued[-1][0]) < 250
    assert continued[-1][1] == "1"
    require_same_losses(hosts, "announced", [row["loss"] for row in read_metrics(reference)])


def test_command_line_runs_a_program_inside_and_ends_everything(capsys: pytest.CaptureFixture[str]) -> None:
    name = "pytestcli"
    command = [sys.executable, "-m", "cluster.local"]
    up = subprocess.run([*command, "up", "--name", name, "--hosts", "1", "--detach"], capture_output=True, text=True)
    assert up.returncode == 0, up.stderr
    try:
        prefix = Hosts.of(name).prefix
        assert "# host1    10.77.0.11" in up.stdout
        assert main(["up", "--name", name]) == 2
        assert f"the name {name} is taken" in capsys.readouterr().err
        program = "import ray, sys; ray.init('10.77.0.1:6379'); print(ray.cluster_resources()['CPU'], *sys.argv[1:])"
        inside = [*command, "exec", "--name", name, "host1", "--", "python", "-c", program, "--", "word"]
        done = subprocess.run(inside, capture_output=True, text=True)
        assert done.stdout.strip() == "1.0 -- word", done.stderr
        assert main(["kill", "--name", name, "host1"]) == 0
        assert main(["mend", "--name", name, "host1"]) == 2
        assert "host1 was killed" in capsys.readouterr().err
        assert main(["cut", "--name", name, "host7"]) == 2
        assert "no host host7: there are head, host1, s3" in capsys.readouterr().err
    finally:
        assert main(["down", "--name", name]) == 0
    assert prefix not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert main(["down", "--name", name]) == 2
    assert f"no hosts named {name}" in capsys.readouterr().err
