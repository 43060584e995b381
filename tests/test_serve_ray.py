"""The same application under Ray Serve: two replicas, a user's requests go to one of them, and the end is as clean."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local.ports import free_ports
from ctrsink.serve.scorer import Scorer
from tests.serve_fixtures import Exported, ask
from tests.services.ray_cluster import RayCluster


class Started:
    """`ctrsink serve --replicas 2` on the session's cluster."""

    def __init__(self, model: str, cluster: RayCluster, log: Path) -> None:
        (self.port,) = free_ports(1)
        self.log = log
        place = ["--address", cluster.gcs_address, "--port", str(self.port), "--replicas", "2"]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ctrsink", "serve", "--model", model, *place],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | cluster.env() | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
            )

    def wait(self, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while "ready on" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            assert time.monotonic() < deadline, self.log.read_text()[-5000:]
            time.sleep(0.2)


@pytest.fixture(scope="module")
def service(served: Exported, ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    started = Started(served.models[0], ray_cluster, tmp_path_factory.mktemp("log") / "serve.log")
    try:
        started.wait()
        yield started
    finally:
        started.process.terminate()
        try:
            started.process.wait(60)
        except subprocess.TimeoutExpired:
            started.process.kill()


def test_scores_are_those_of_the_scorer(service: Started, served: Exported) -> None:
    scorer = Scorer.load(served.models[0])
    for request in served.requests[:6]:
        reply = ask(service.port, "/v1/score", request)
        assert (reply.status, reply.json["model"][:2]) == (200, "a@")
        assert reply.json["probabilities"] == pytest.approx(scorer.score(request), abs=1e-6)
    assert ask(service.port, "/health/ready").json["ready"] is True
    assert ask(service.port, "/v1/score", b"{").status == 400
    assert ask(service.port, "/v1/score", b"{}").status == 422


def test_a_users_requests_go_to_one_replica(service: Started, served: Exported) -> None:
    replicas: dict[int, set[str]] = {}
    for user in range(10):
        for _ in range(2):
            reply = ask(service.port, "/v1/score", served.requests[0], {"X-Session-Id": f"user {user}"}, 240)
            assert reply.status == 200
            replicas.setdefault(user, set()).add(reply.headers["x-replica"])
    assert {len(of) for of in replicas.values()} == {1}
    assert len(set.union(*replicas.values())) == 2


def test_sigterm_ends_it_and_the_cluster_goes_on(service: Started, served: Exported, ray_cluster: RayCluster) -> None:
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(120) == 0, service.log.read_text()[-3000:]
    assert "every accepted request was answered" in service.log.read_text()
