"""What every test shares: an environment without surprises, the started servers, and the rule that CI never skips."""

import logging
import os
import sys
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

# Before torch, transformers, DeepSpeed or Ray are imported, here or in a process that a test starts.
os.environ.update(
    OMP_NUM_THREADS="1",  # spinning OpenMP threads of several processes slow each other down tenfold on few cores
    DS_ACCELERATOR="cpu",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_USAGE_STATS_ENABLED="0",
)

if TYPE_CHECKING:
    from cluster.local.seaweed import SeaweedServer
    from tests.serve_fixtures import Exported
    from tests.services.faulty_proxy import FaultyProxy
    from tests.services.ray_cluster import RayCluster

BUCKET = "ctrsink-test"
IN_CI = os.environ.get("CI", "").lower() == "true"

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if IN_CI else "local")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["SeaweedServer"]:
    """A real S3 server on loopback with the bucket `ctrsink-test`; its credentials are in `os.environ` while it runs."""
    from cluster.local.seaweed import SeaweedServer

    nothing = tmp_path_factory.mktemp("aws") / "empty"
    nothing.touch()
    server = SeaweedServer()
    with pytest.MonkeyPatch.context() as environment:
        # The developer's own credentials and profiles must not leak into a test, nor a metadata service be asked.
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)
        environment.setenv("AWS_SHARED_CREDENTIALS_FILE", str(nothing))
        environment.setenv("AWS_CONFIG_FILE", str(nothing))
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        try:
            server.start()
            for name, value in server.env().items():
                environment.setenv(name, value)
            server.create_bucket(BUCKET)
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def ray_cluster(s3_server: "SeaweedServer") -> Iterator["RayCluster"]:
    """A started Ray cluster with two CPUs and token authentication, whose workers can reach `s3_server`."""
    from tests.services.ray_cluster import RayCluster

    cluster = RayCluster(cpus=2)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def between(s3_server: "SeaweedServer") -> Iterator["FaultyProxy"]:
    """A proxy before `s3_server`, which nobody is led to yet."""
    from tests.services.faulty_proxy import FaultyProxy

    with FaultyProxy(s3_server.endpoint) as started:
        yield started


@pytest.fixture
def proxy(between: "FaultyProxy", monkeypatch: pytest.MonkeyPatch) -> "FaultyProxy":
    """The proxy in place of the server, without faults yet, and a short deadline for what it will do."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.endpoint)
    monkeypatch.setenv("CTRSINK_STORAGE_DEADLINE_S", "20")
    between.plant()
    return between


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> "Exported":
    """Two exported models that take the same requests."""
    from tests.serve_fixtures import exported

    return exported(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what this run was not asked for (`slow`) and what this machine cannot run (`gpu`, `root`)."""
    unwanted = set() if "slow" in config.option.markexpr else {"slow"}
    if not (sys.platform == "linux" and os.geteuid() == 0):
        unwanted.add("root")
    dropped = [item for item in items if any(item.get_closest_marker(name) for name in unwanted) or _lacks_gpus(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


def _lacks_gpus(item: pytest.Item) -> bool:
    """Whether a test needs more GPUs than there are: `gpu` one, `gpu(n)` as many as it says."""
    mark = item.get_closest_marker("gpu")
    return mark is not None and _gpus() < (mark.args[0] if mark.args else 1)


@cache
def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _fail_instead_of_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"CI may not skip {report.nodeid}: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_instead_of_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_instead_of_skip(report)
    return report


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What ctrsink logs in this process, also where it would configure its own handlers."""
    monkeypatch.setattr(logging.getLogger("ctrsink"), "propagate", True)
    monkeypatch.setattr("ctrsink.logs.configure", lambda *args: None)
    caplog.set_level(logging.INFO, "ctrsink")
    return caplog
