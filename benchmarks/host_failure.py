"""Seconds until training goes on after a host failed: killed and replaced by another, or cut off and joined again.

A tiny model is trained on two hosts of `cluster.local`, which needs root on Linux; data and run lie on its S3 server.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.raw import synthetic_log
from benchmarks.report import machine, machine_line, markdown
from cluster.local.hosts import BUCKET, Hosts
from ctrsink import strict_json
from ctrsink.errors import InputError, RunError

ROOT = Path(__file__).resolve().parent.parent
FAILURES = ("kill", "cut")
_STEP = re.compile(r"step (\d+)/\d+ stage")


@dataclass(frozen=True)
class Recovery:
    """Seconds of each part of one failure, and the steps on either side of it."""

    failure: str
    detected_s: float
    """From the failure until Ray takes the node for dead."""
    joined_s: float
    """From adding a host, or mending the link, until Ray knows its node: from here on the group can start."""
    resumed_s: float
    """From there until the next training step is logged."""
    failed_after: int
    """The last step that was logged before the failure."""
    resumed_at: int
    """The first step that was logged after it."""


class Job:
    """A program on the head, followed line by line."""

    def __init__(self, hosts: Hosts, command: list[str], folder: Path) -> None:
        self.lines: list[str] = []
        with hosts.inside("head"):
            self._process = subprocess.Popen(
                command, cwd=folder, env=hosts.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def steps(self) -> list[int]:
        """Steps in the order in which they were logged."""
        return [int(found[1]) for line in self.lines if (found := _STEP.search(line))]

    def wait(self, ready: Callable[[], bool], timeout: float) -> None:
        """Until `ready`. Raises RunError with the end of the output where the job ended before, or the time is over."""
        deadline = time.monotonic() + timeout
        while not ready():
            if not self._reader.is_alive() or time.monotonic() > deadline:
                raise RunError("the job did not come so far:\n" + "".join(self.lines[-60:]))
            time.sleep(0.1)

    def result(self, timeout: float) -> str:
        """All output, once the job has succeeded. Raises RunError where it failed."""
        self._reader.join(timeout)
        if self._process.poll() != 0:
            raise RunError("the job failed:\n" + "".join(self.lines[-60:]))
        return "".join(self.lines)

    def end(self) -> None:
        """Stop following; hosts.down ends what runs on the hosts."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        self.lines.extend(self._process.stdout)
        self._process.wait()


def recover(hosts: Hosts, job: Job, failure: str, host: str, at: int, timeout: float = 240) -> Recovery:
    """Let `host` fail once step `at` is logged, bring a host back once Ray has noticed, and wait for training to go on.

    Raises:
        RunError: one of these took longer than `timeout` seconds, or the job ended.
    """
    job.wait(lambda: at <= max(job.steps(), default=0), timeout)
    old = _nodes(hosts)
    began, failed_after = time.monotonic(), job.steps()[-1]
    hosts.kill(host) if failure == "kill" else hosts.cut(host)
    gone = {node for node, address in old.items() if address == hosts.addresses()[host]}
    job.wait(lambda: not gone & _nodes(hosts).keys(), timeout)
    detected, logged = time.monotonic(), len(job.steps())
    hosts.add() if failure == "kill" else hosts.mend(host)
    job.wait(lambda: bool(_nodes(hosts).keys() - old.keys()), timeout)
    joined = time.monotonic()
    job.wait(lambda: len(job.steps()) > logged, timeout)
    resumed = time.monotonic()
    return Recovery(
        failure=failure,
        detected_s=round(detected - began, 1),
        joined_s=round(joined - detected, 1),
        resumed_s=round(resumed - joined, 1),
        failed_after=failed_after,
        resumed_at=job.steps()[logged],
    )


def _nodes(hosts: Hosts) -> dict[str, str]:
    """Ray's nodes; once more where the job server is slow to answer."""
    while True:
        try:
            return hosts.ray_nodes()
        except OSError:
            time.sleep(0.2)


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = run(args, Path(folder))
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.host_failure", description=__doc__)
    parser.add_argument("--failure", nargs="+", choices=FAILURES, default=list(FAILURES))
    parser.add_argument("--repeats", type=int, default=3, help="of each, in turn (default: %(default)s)")
    parser.add_argument("--at", type=int, default=25, help="the step after which the host fails (default: %(default)s of 60)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args()


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train once per failure, each on new hosts, and return all figures."""
    found = machine()
    config = _config(folder)
    recoveries = [_once(failure, args.at, config) for _ in range(args.repeats) for failure in args.failure]
    return {"machine": found, "at": args.at, "recoveries": [asdict(recovery) for recovery in recoveries]}


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    header = [
        "failure",
        "s until Ray sees it",
        "s until a host is back",
        "s until training goes on",
        "failed after step",
        "went on with",
    ]
    rows = [list(recovery.values()) for recovery in report["recoveries"]]
    return f"{machine_line(report['machine'])}\n\n{markdown(header, rows)}"


def _once(failure: str, at: int, config: Path) -> Recovery:
    hosts = Hosts.up("failure", hosts=2, cpus=1)
    job = None
    try:
        own = [f"run_dir=s3://{BUCKET}/run", f"data.uri=s3://{BUCKET}/data"]
        command = [sys.executable, "-m", "ctrsink", "data", "prepare", "--config", str(config), *own]
        Job(hosts, command, ROOT).result(300)
        ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--"]
        command = [*ray, "python", str(ROOT / "launchers/train.py"), "--config", str(config), *own]
        job = Job(hosts, command, ROOT)
        recovery = recover(hosts, job, failure, "host2", at)
        job.result(300)
        return recovery
    finally:
        if job is not None:
            job.end()
        hosts.down()


def _config(folder: Path) -> Path:
    """A run of 60 steps in two stages, with a checkpoint every 10 steps."""
    path = synthetic_log(folder, 5_000)
    tree = yaml.safe_load(path.read_text())
    align, everything = yaml.safe_load((ROOT / "configs/stages/align-then-all.yaml").read_text())["stages"]
    tree |= {
        "stages": [{**align, "epochs": None, "steps": 20}, {**everything, "epochs": None, "steps": 40}],
        "train": {"batch_size": 16, "micro_batch_size": 8, "log_every": 1, "checkpoint_every": 10, "zero_stage": 2},
        "runtime": {"kind": "ray", "workers": 2, "max_failures": 3},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


if __name__ == "__main__":
    sys.exit(main())
