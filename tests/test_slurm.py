"""The Slurm script, run: two jobs at once on the same two hosts, which are namespaces; Slurm, Ray and training are stand-ins.

The stand-ins do what the script counts on: `srun` starts a process on each host and hands a signal on to all of its step;
`ray start` binds every port that it is given on its host, and joins a head that must be there; the run waits for a signal.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local.network import Network

HOSTS = {"n1": "10.78.0.1", "n2": "10.78.0.2"}
IDS = (2 * os.getpid(), 2 * os.getpid() + 1)
SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
flags = [words.pop(0) for _ in range(next(i for i, word in enumerate(words) if not word.startswith("--")))]
(hosts,) = (flag.partition("=")[2].split(",") for flag in flags if flag.startswith("--nodelist="))
assert f"--ntasks={{len(hosts)}}" in flags and "--overlap" in flags, flags
steps = [subprocess.Popen(["ip", "netns", "exec", f"{prefix}-{{host}}", *words], start_new_session=True) for host in hosts]
def hand_on(number, frame):
    for step in steps:
        os.killpg(step.pid, number)
signal.signal(signal.SIGTERM, hand_on)
sys.exit(max(abs(step.wait()) for step in steps))
"""
SCONTROL = """#!/bin/sh
case "$1" in
    show) echo "$3" | tr , '\\n' ;;
    requeue) echo "$2" >> {requeued} ;;
esac
"""
RAY = """#!{python}
import os, pathlib, signal, socket, sys, time
verb, *words = sys.argv[1:]
flags = dict(word[2:].partition("=")[::2] for word in words)
if "address" in flags:
    host, port = flags["address"].split(":")
    socket.create_connection((host, int(port)), 5).close()
if verb == "health-check":
    sys.exit()
if "head" in flags:
    time.sleep(2)  # a worker must wait for it
pathlib.Path(flags["temp-dir"]).mkdir()
held = []
for port in sorted(int(value) for name, value in flags.items() if name.endswith("port") and int(value)):
    held.append(socket.create_server((flags["node-ip-address"], port)))
assert len(os.environ["RAY_AUTH_TOKEN"]) == 64 and os.environ["RAY_AUTH_MODE"] == "token"
print("node", flags["node-ip-address"], "of", flags.get("address", "its own"), flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.pause()
"""
RUN = """#!/bin/bash
echo "runs $*"
trap 'exit 143' TERM
while [[ $* != *short* ]] || (( SECONDS < 8 )); do sleep 0.2; done
"""


class Slurm:
    """Starts the script as `sbatch` would: on the first of its hosts, with the variables of a job."""

    def __init__(self, folder: Path, script: Path) -> None:
        self.folder, self.script = folder, script
        self.network = Network(f"slurm-{secrets.token_hex(3)}")
        self.requeued = folder / "requeued"
        self.jobs: list[subprocess.Popen[bytes]] = []
        (folder / "bin").mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "ray": RAY}.items():
            filled = text.format(python=sys.executable, prefix=self.network.prefix, requeued=self.requeued)
            (folder / "bin" / name).write_text(filled)
        (folder / "bin/python").write_text(RUN)
        for program in (folder / "bin").iterdir():
            program.chmod(0o755)
        self.network.create()
        for host, address in HOSTS.items():
            self.network.add(host, f"{address}/24")

    def sbatch(self, job: int, *arguments: str) -> subprocess.Popen[bytes]:
        of_the_job = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": ",".join(HOSTS), "SLURM_CPUS_PER_TASK": "4"}
        environment = os.environ | of_the_job | {"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        with (self.folder / f"{job}.log").open("ab") as log:
            started = subprocess.Popen(
                ["ip", "netns", "exec", f"{self.network.prefix}-n1", "bash", str(self.script), *arguments],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.jobs.append(started)
        return started

    def log(self, job: int) -> str:
        return (self.folder / f"{job}.log").read_text()


@pytest.fixture
def slurm(tmp_path: Path, repository: Path) -> Iterator[Slurm]:
    made = Slurm(tmp_path, repository / "cluster/slurm/ctr-sink.sbatch")
    try:
        yield made
    finally:
        made.network.remove()
        for job in made.jobs:
            job.wait(timeout=10)


def left_of(*jobs: int) -> list[Path]:
    """Folders that Ray nodes of these jobs have now."""
    return [folder for job in jobs for folder in Path("/tmp").glob(f"ray-{job}.*")]


@pytest.mark.root
def test_two_jobs_share_their_hosts_and_leave_nothing(slurm: Slurm) -> None:
    first, second = IDS
    short, endless = slurm.sbatch(first, "--config", "short.yaml"), slurm.sbatch(second, "--config", "long.yaml", "seed=1")
    deadline = time.monotonic() + 120
    while not all("runs" in slurm.log(job) and slurm.log(job).count("node 10.78.0.") == 2 for job in IDS):
        assert time.monotonic() < deadline, slurm.log(first) + slurm.log(second)
        time.sleep(0.2)
    assert len(left_of(first)) == len(left_of(second)) == 2
    addresses = [re.findall(r"runtime\.address=(\S+)", slurm.log(job)) for job in IDS]
    assert len({address for (address,) in addresses}) == 2
    assert (
        f"runs -m ctrsink train --resume --config long.yaml seed=1 runtime.kind=ray runtime.address={addresses[1][0]}"
        in slurm.log(second)
    )
    assert f"node 10.78.0.2 of {addresses[1][0]}" in slurm.log(second)
    assert short.wait(timeout=60) == 0, slurm.log(first)
    assert not left_of(first)
    assert not slurm.requeued.exists()
    # The other one is told that its time is nearly over: it saves itself and is queued again.
    assert endless.poll() is None
    endless.send_signal(signal.SIGUSR1)
    assert endless.wait(timeout=60) == 143, slurm.log(second)
    assert slurm.requeued.read_text() == f"{second}\n"
    assert not left_of(second)
    assert not any(slurm.network.alive(host) for host in HOSTS)


def test_it_says_what_is_missing(repository: Path) -> None:
    done = subprocess.run(["bash", repository / "cluster/slurm/ctr-sink.sbatch"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "ctr-sink.sbatch: say what to train: --config FILE run_dir=... data.uri=...\n"


@pytest.mark.parametrize("script", ["cluster/slurm/ctr-sink.sbatch", ".ci/run"])
def test_the_linter_of_shell_scripts_finds_nothing(script: str, repository: Path) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "--shell=bash", repository / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
