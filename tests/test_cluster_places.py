"""The files below cluster/ for other places than one RayJob: by the tools' own schemas where they are here, else field by field.

Ray's cluster schema comes with Ray. Kueue, Compose, SkyPilot and Kubernetes have none that is installed here: what breaks in
practice is looked at instead.
"""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from ctrsink import __version__
from ctrsink.config import load_run
from tests.test_cluster_manifests import CLUSTER_FIELDS, JOB_FIELDS, containers

CLUSTER = Path(__file__).resolve().parent.parent / "cluster"


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text("utf-8"))


@pytest.fixture(scope="module")
def queued() -> dict[str, Any]:
    return read("kuberay/rayjob-kueue.yaml")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return read("compose/compose.yaml")


def test_the_job_of_kueue_is_the_plain_one_but_for_its_queue(queued: dict[str, Any]) -> None:
    plain = read("kuberay/rayjob.yaml")
    assert queued["metadata"].pop("labels") == {"kueue.x-k8s.io/queue-name": "training"}
    assert queued["spec"].pop("suspend") is True
    assert set(queued["spec"]) <= JOB_FIELDS
    # Kueue admits a gang: nothing may change its size, and what it preempts must go on when it is admitted again.
    assert queued["spec"]["rayClusterSpec"].pop("enableInTreeAutoscaling") is False
    (group,) = queued["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == group.pop("maxReplicas")
    words = shlex.split(queued["spec"].pop("entrypoint"))
    words.remove("--resume")
    assert words == shlex.split(plain["spec"].pop("entrypoint"))
    assert plain["spec"]["rayClusterSpec"].pop("enableInTreeAutoscaling") is True
    plain["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop("maxReplicas")
    assert queued == plain


def test_the_job_fits_the_quota_of_its_queue() -> None:
    flavour, queue, local = yaml.safe_load_all((CLUSTER / "kuberay/kueue.yaml").read_text("utf-8"))
    job = read("kuberay/rayjob-kueue.yaml")
    assert local["metadata"]["name"] == job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    (resources,) = queue["spec"]["resourceGroups"]
    (offered,) = resources["flavors"]
    assert offered["name"] == flavour["metadata"]["name"]
    quota = {entry["name"]: entry["nominalQuota"] for entry in offered["resources"]}
    assert list(quota) == resources["coveredResources"]
    spec = job["spec"]["rayClusterSpec"]
    (group,) = spec["workerGroupSpecs"]
    asked = [*[group["template"]] * group["replicas"], spec["headGroupSpec"]["template"]]
    requests = [container["resources"]["requests"] for template in asked for container in template["spec"]["containers"]]
    assert set().union(*requests) <= set(quota), "Kueue never admits what asks for a resource that no quota covers"
    assert sum(int(request["cpu"]) for request in requests) <= quota["cpu"]
    assert sum(int(request["memory"].removesuffix("Gi")) for request in requests) <= int(quota["memory"].removesuffix("Gi"))
    assert sum(int(request.get("nvidia.com/gpu", 0)) for request in requests) <= quota["nvidia.com/gpu"]


def test_the_cluster_that_stays_is_that_of_the_job_and_open_to_nobody() -> None:
    cluster, job = read("kuberay/raycluster.yaml"), read("kuberay/rayjob.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert set(cluster["spec"]) <= CLUSTER_FIELDS
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert cluster["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["spec"]["workerGroupSpecs"][0]["minReplicas"] == 0
    assert list(containers(cluster["spec"])) == list(containers(job["spec"]["rayClusterSpec"]))


def test_the_network_policy_opens_the_job_server_and_metrics_alone() -> None:
    policy = read("kuberay/network-policy.yaml")
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    among, *others = policy["spec"]["ingress"]
    assert among == {"from": [{"podSelector": policy["spec"]["podSelector"]}]}
    opened = {port["port"] for rule in others for port in rule["ports"]}
    assert opened == {8265, 8080}
    assert all("ipBlock" not in place for rule in others for place in rule["from"])


def test_every_service_of_compose_is_on_loopback_healthy_and_without_rights(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"head", "worker", "store"}
    for name, service in services.items():
        assert "healthcheck" in service, name
        assert not service.get("privileged")
        assert "network_mode" not in service
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        tag = service["image"].rpartition(":")[2]
        assert tag != "latest"
    for name in ("head", "worker"):
        service = services[name]
        assert service["image"] == f"ctrsink:{__version__}"
        assert (CLUSTER / "compose" / service["build"] / "Dockerfile").is_file()
        assert service["shm_size"] == "2gb"
        assert int(re.findall(r"--object-store-memory=(\d+)", service["command"])[0]) < 2 * 10**9
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
    assert services["worker"]["depends_on"]["head"]["condition"] == "service_healthy"
    assert services["head"]["depends_on"]["store"]["condition"] == "service_healthy"


def test_no_secret_of_compose_has_a_value_or_a_default(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if re.search("TOKEN|KEY", name):
                assert re.fullmatch(rf"\$\{{{name}:\?[^}}]*\}}", value), name


def test_the_task_of_skypilot_keeps_clear_of_skypilots_own_ray() -> None:
    task = read("skypilot/ctr-sink.yaml")
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [143]
    assert set(task["secrets"].values()) == {None}
    script = task["run"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    assert "--resume" in script
    assert "auto" not in script
    assert not re.search(r"=(6380|8265|8266|8076|52365)\b|/tmp/ray_skypilot", script)  # SkyPilot's ports and Ray's defaults
    ports = [int(port) for port in re.findall(r"-port=(\d+)", script)]
    assert len(ports) == len(set(ports)) == 11
    run = load_run(
        CLUSTER.parent / task["envs"]["CONFIG"], [f"run_dir={task['envs']['RUN_DIR']}", f"data.uri={task['envs']['DATA']}"]
    )
    assert run.run_dir.startswith("s3://")


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_clusters_of_ray_up_are_valid_and_their_workers_have_a_role(cloud: str) -> None:
    tree = read(f"ray-up/{cloud}.yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(tree, schema)
    head, *workers = tree["available_node_types"].items()
    assert tree["head_node_type"] == head[0]
    assert head[1]["resources"] == {"CPU": 0}
    role = {"aws": "IamInstanceProfile", "gcp": "serviceAccounts"}[cloud]
    for name, kind in workers:
        assert kind["node_config"][role] != head[1]["node_config"][role], name
        assert kind["resources"] == ({"CPU": 16, "GPU": 1} if cloud == "gcp" else {}), name  # AWS alone is asked for them
    spot = [
        re.search("(?i)spot", json.dumps(kind["node_config"])) is not None for _, kind in tree["available_node_types"].items()
    ]
    assert spot == [False, True, False]
    starts = [
        command for command in (*tree["head_start_ray_commands"], *tree["worker_start_ray_commands"]) if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert tree["rsync_filter"] == [".gitignore", ".rayignore"]


def test_only_examples_name_places_and_no_file_a_secret() -> None:
    for path in CLUSTER.rglob("*.yaml"):
        text = path.read_text("utf-8")
        assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|hf_[A-Za-z0-9]{20}", text), path
