"""A real Ray head on loopback with token authentication, started by the command line and ended by its own process ids."""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from cluster.local import ray_node
from cluster.local.ports import free_ports

MARK = "CTRSINK_TEST_CLUSTER"
REPOSITORY = Path(__file__).resolve().parent.parent.parent


class RayCluster:
    """One head node with `cpus` CPUs; the environment of the test process (S3 credentials) is that of its workers."""

    def __init__(self, cpus: int = 2) -> None:
        self.cpus = cpus
        self._mark = secrets.token_hex(16)
        self._token = secrets.token_hex(32)
        self._head: subprocess.Popen[bytes] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self._gcs, self._dashboard, self._client, self._agent = free_ports(4)

    @property
    def address(self) -> str:
        """URL of the job server, for `ray job submit --address`."""
        return f"http://127.0.0.1:{self._dashboard}"

    @property
    def gcs_address(self) -> str:
        """host:port for `ray.init`."""
        return f"127.0.0.1:{self._gcs}"

    def env(self) -> dict[str, str]:
        """What a client needs beside the address; without it the cluster refuses the client."""
        return ray_node.credentials(self._folder / "token")

    def start(self, timeout: float = 90) -> None:
        """Start the head and wait until its job server answers.

        Raises:
            RuntimeError: the head ended or did not answer within `timeout` seconds; the message holds the end of its log.
        """
        ray_node.write_token(self._folder / "token", self._token)
        environment = ray_node.environment(self._folder / "token", os.environ) | {
            MARK: self._mark,
            "PYTHONPATH": str(REPOSITORY),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on any system it means: no second node, so listen on loopback alone
            "RAY_metrics_report_interval_ms": "1000",
        }
        log = self._folder / "head.log"
        with log.open("wb") as stream:
            self._head = subprocess.Popen(
                ray_node.command(
                    *("127.0.0.1", self.cpus, "--head", f"--temp-dir={self._folder}"),
                    *("--dashboard-host=127.0.0.1", "--include-dashboard=true"),
                    *(f"--port={self._gcs}", f"--dashboard-port={self._dashboard}"),
                    *(f"--ray-client-server-port={self._client}", f"--dashboard-agent-listen-port={self._agent}"),
                    *("--min-worker-port=0", "--max-worker-port=0"),  # ports that the system hands out, no fixed range
                    f"--object-store-memory={200 * 2**20}",
                ),
                env=environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout
        while not ray_node.answers(self.address, self._token):
            if self._head.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Ray head does not answer on {self.address}:\n{log.read_text()[-3000:]}")
            time.sleep(0.25)

    def stop(self) -> None:
        """End the head and whatever it started, and remove its folder. Other Ray processes of the machine are not touched."""
        if self._head is not None:
            self._head.send_signal(signal.SIGTERM)
            try:
                self._head.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._head.kill()
                self._head.wait()
        # Jobs run in sessions of their own, so the process group is not all: the mark in the environment is.
        left = [process for process in psutil.process_iter() if self._is_ours(process)]
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=10)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self._mark
        except psutil.Error:
            return False
