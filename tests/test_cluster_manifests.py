"""The Kubernetes manifests: fields that KubeRay knows, versions and paths that this repository has, and no secret."""

import importlib
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from ctrsink.config import load_run
from ctrsink.errors import InputError
from tests.serve_fixtures import TOKEN
from tests.test_dockerfile import arguments, instructions

# Fields of RayJobSpec and RayClusterSpec in the reference of KubeRay 1.7; an unknown field would be dropped in silence.
JOB_FIELDS = {
    *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint", "entrypointNumCpus"),
    *("entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata", "preRunningDeadlineSeconds"),
    *("rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig"),
    *("submitterPodTemplate", "suspend", "ttlSecondsAfterFinished"),
}
CLUSTER_FIELDS = {
    *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec"),
    *("headServiceAnnotations", "networkPolicy", "rayVersion", "suspend", "tlsOptions", "workerGroupSpecs"),
}
SERVICE_FIELDS = {
    *("excludeHeadPodFromServeSvc", "managedBy", "rayClusterConfig", "rayClusterDeletionDelaySeconds", "serveConfigV2"),
    *("serveService", "suspend", "upgradeStrategy"),
}


@pytest.fixture(scope="module")
def job(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "cluster/kuberay/rayjob.yaml").read_text())


@pytest.fixture(scope="module")
def service(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "cluster/kuberay/rayservice.yaml").read_text())


@pytest.fixture(params=["job", "service"])
def cluster(job: dict[str, Any], service: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    """That of the job, and that of the service."""
    return job["spec"]["rayClusterSpec"] if request.param == "job" else service["spec"]["rayClusterConfig"]


def containers(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield from group["template"]["spec"]["containers"]


def mappings(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a document."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict):
        yield node
    for child in children:
        yield from mappings(child)


def test_a_cluster_has_known_fields_only(cluster: dict[str, Any]) -> None:
    assert set(cluster) <= CLUSTER_FIELDS


def test_is_a_ray_job_with_known_fields_only(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) <= JOB_FIELDS
    assert set(job["spec"]["submitterConfig"]) == {"backoffLimit"}


def test_is_a_ray_service_with_known_fields_only(service: dict[str, Any]) -> None:
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert set(service["spec"]) <= SERVICE_FIELDS
    assert service["spec"]["upgradeStrategy"]["type"] in ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")


def test_the_service_is_one_that_this_package_builds_and_ray_takes(
    service: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    module, _, name = application.import_path.partition(":")
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(InputError, match=TOKEN):
        getattr(importlib.import_module(module), name)(application.args)
    monkeypatch.setenv(TOKEN, "a-token-of-more-than-16-characters")
    built = getattr(importlib.import_module(module), name)(application.args)
    assert isinstance(built, Application)
    with pytest.raises(InputError, match="did you mean"):
        getattr(importlib.import_module(module), name)(application.args | {"devise": "cuda"})


def test_every_replica_of_the_service_has_a_gpu_and_pods_have_the_token(service: dict[str, Any]) -> None:
    config, cluster = yaml.safe_load(service["spec"]["serveConfigV2"]), service["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert config["applications"][0]["args"]["replicas"] <= group["minReplicas"] * gpus
    assert config["applications"][0]["args"]["model"].startswith("s3://")
    for container in containers(cluster):
        assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["ctrsink-storage", "ctrsink-serve"]
    ports = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    assert config["http_options"]["port"] in [port["containerPort"] for port in ports]


def test_ray_version_is_the_one_that_the_package_pins(cluster: dict[str, Any], repository: Path) -> None:
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    ray = next(r for r in map(Requirement, extras["train"]) if r.name == "ray")
    assert cluster["rayVersion"] in ray.specifier


def test_entrypoint_runs_files_of_the_image_with_a_valid_configuration(job: dict[str, Any], repository: Path) -> None:
    root, *_ = arguments(instructions(repository / "Dockerfile"), "WORKDIR")
    python, script, flag, config, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (python, flag) == ("python", "--config")
    assert (repository / Path(script).relative_to(root)).is_file()
    run = load_run(repository / Path(config).relative_to(root), overrides)
    assert run.run_dir.startswith("s3://")
    assert run.data.uri.startswith("s3://")
    assert (run.runtime.kind, run.runtime.device, run.runtime.address) == ("ray", "cuda", None)


def test_workers_of_the_run_fit_the_cluster(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    overrides = dict(word.split("=", 1) for word in shlex.split(job["spec"]["entrypoint"]) if "=" in word)
    (group,) = cluster["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert int(overrides["runtime.workers"]) <= group["replicas"] * gpus


def test_job_is_never_submitted_twice_and_lets_its_machines_go(job: dict[str, Any]) -> None:
    spec = job["spec"]
    assert spec["submitterConfig"]["backoffLimit"] == spec["backoffLimit"] == 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] >= 0
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]


def test_cluster_asks_for_a_token(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"]["mode"] == "token"


def test_every_container_has_resources_one_image_and_no_privileges(cluster: dict[str, Any]) -> None:
    for container in containers(cluster):
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][kind]), container["name"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    (image,) = {container["image"] for container in containers(cluster)}
    assert ":" in image.rsplit("/", 1)[-1]
    assert not image.endswith(":latest")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True


def test_image_is_tagged_with_the_version_of_the_package(cluster: dict[str, Any], repository: Path) -> None:
    version = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    assert {container["image"].rsplit(":", 1)[-1] for container in containers(cluster)} == {version}


def test_no_secret_is_written_out(job: dict[str, Any], service: dict[str, Any]) -> None:
    for mapping in (*mappings(job), *mappings(service)):
        for variable in mapping.get("env", []):
            assert "value" not in variable or not any(
                word in variable["name"] for word in ("KEY", "SECRET", "TOKEN", "PASSWORD")
            ), variable["name"]
    assert "AWS_" not in job["spec"]["entrypoint"]
    for container in containers(job["spec"]["rayClusterSpec"]):
        assert [next(iter(source)) for source in container["envFrom"]] == ["secretRef"]
