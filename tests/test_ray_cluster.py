"""The test cluster is a real one: a submitted job runs on it, and whoever has no token is refused."""

import os
import subprocess
import sys

from cluster.local.seaweed import SeaweedServer
from tests.services.ray_cluster import RayCluster

PROGRAM = """
import os, ray
ray.init()
remote = ray.remote(lambda: os.environ["AWS_ENDPOINT_URL"])
print("workers see", ray.get(remote.remote()), "with", int(ray.cluster_resources()["CPU"]), "CPUs")
"""


def submit(cluster: RayCluster, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", f"--address={cluster.address}"),
            *("--", "python", "-c", PROGRAM),
        ],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_submitted_job_runs_on_the_cluster_and_sees_the_object_store(ray_cluster: RayCluster, s3_server: SeaweedServer) -> None:
    done = submit(ray_cluster, ray_cluster.env())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"workers see {s3_server.endpoint} with 2 CPUs" in done.stdout
    assert "succeeded" in done.stdout


def test_client_without_the_token_is_refused(ray_cluster: RayCluster) -> None:
    done = submit(ray_cluster, {"RAY_AUTH_MODE": "disabled"})
    assert done.returncode != 0
    assert "authentication" in (done.stdout + done.stderr).lower()
    assert "workers see" not in done.stdout


def test_client_with_another_token_is_refused(ray_cluster: RayCluster) -> None:
    done = submit(ray_cluster, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
    assert done.returncode != 0
    assert "authentication" in (done.stdout + done.stderr).lower()
    assert "workers see" not in done.stdout
