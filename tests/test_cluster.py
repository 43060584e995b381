"""The main job on a real cluster: two Ray Train workers with DeepSpeed, data and run on S3, submitted with a token."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from ctrsink import storage
from ctrsink.config import parse_run
from ctrsink.export.package import export_run
from ctrsink.runtime.start import start
from ctrsink.serve.requests import request_of
from ctrsink.serve.scorer import Scorer
from ctrsink.train.checkpoint.checkpoint import find_checkpoint
from ctrsink.train.observe.telemetry import read_metrics
from ctrsink.train.restore import restore_run
from tests.conftest import BUCKET
from tests.runs import prepared_data, run_tree
from tests.services.ray_cluster import RayCluster

NO_DROPOUT: dict[str, Any] = {"model": {"backbone": {"config": {"attention_dropout": 0.0}}}}
TWO_WORKERS: dict[str, Any] = {"runtime": {"kind": "ray", "workers": 2}, "train": {"micro_batch_tokens": 150}}


@pytest.fixture(scope="module")
def data(ray_cluster: RayCluster) -> str:
    return prepared_data(f"s3://{BUCKET}/cluster/data")


@pytest.fixture(scope="module")
def working_dir(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user would send: the code, and a configuration beside it."""
    folder = tmp_path_factory.mktemp("working-dir")
    for name in ("ctrsink", "launchers"):
        shutil.copytree(repository / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(command: list[str], working_dir: Path, cluster: RayCluster) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=working_dir, env={**os.environ, **cluster.env()}, capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def submitted(data: str, working_dir: Path, ray_cluster: RayCluster) -> str:
    """The run's folder after `ray job submit` ended SUCCEEDED."""
    run_dir = f"s3://{BUCKET}/cluster/submitted"
    (working_dir / "run.yaml").write_text(yaml.safe_dump(run_tree(data, run_dir, **NO_DROPOUT, **TWO_WORKERS)))
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", f"--address={ray_cluster.address}", "--working-dir=."]
    done = run([*ray, "--", "python", "launchers/train.py", "--config", "run.yaml", "--json"], working_dir, ray_cluster)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout
    assert "step 20/20 stage all loss" in done.stdout
    return run_dir


def test_submitted_job_leaves_the_whole_run_on_s3(submitted: str, data: str, tmp_path: Path) -> None:
    names = storage.list_files(submitted)
    assert {"config.yaml", "metrics.jsonl", "result.json"} <= set(names)
    assert [row["step"] for row in read_metrics(submitted)] == list(range(1, 21))
    assert find_checkpoint(submitted).step == 20
    assert storage.list_files(f"{submitted}/tensorboard")
    assert json.loads(storage.read_bytes(f"{submitted}/evaluation/test.json"))["impressions"] > 0
    # The same global batches on one process without Ray give the same run.
    local = tmp_path / "local"
    start(parse_run(run_tree(data, str(local), **NO_DROPOUT), "test"))
    alone, together = ([row["loss"] for row in read_metrics(folder)] for folder in (str(local), submitted))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_export_and_score_from_the_run_on_s3(submitted: str, tmp_path: Path) -> None:
    export_run(submitted, str(tmp_path / "model"))
    dataset = restore_run(submitted).dataset
    table = pq.read_table(io.BytesIO(storage.read_bytes(f"{submitted}/evaluation/test.parquet"))).to_pylist()
    scorer = Scorer.load(str(tmp_path / "model"))
    request = request_of(dataset, 0, table[0]["event"], None)
    (probability,) = scorer.score(request)
    assert 0 < probability < 1


def test_submit_verb_follows_the_job_and_resumes(submitted: str, data: str, working_dir: Path, ray_cluster: RayCluster) -> None:
    verb = [sys.executable, "-m", "ctrsink", "submit", "--config", "run.yaml", "--address", ray_cluster.address, "--json"]
    refused = run(verb, working_dir, ray_cluster)
    assert refused.returncode == 1
    assert "already holds a run: give --resume" in refused.stderr
    # A finished run is measured again; one process in the job is enough for that.
    done = run([*verb, "--resume", "runtime.kind=local", "runtime.workers=1"], working_dir, ray_cluster)
    assert done.returncode == 0, done.stderr[-5000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["status"] == "SUCCEEDED"
    assert result["run_dir"] == submitted


def test_submit_without_the_token_is_bad_input(working_dir: Path, ray_cluster: RayCluster, submitted: str) -> None:
    verb = [sys.executable, "-m", "ctrsink", "submit", "--config", "run.yaml", "--address", ray_cluster.address]
    done = subprocess.run(
        verb, cwd=working_dir, env={**os.environ, "RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert f"error: the job server at {ray_cluster.address} did not take the job" in done.stderr
    assert "Traceback" not in done.stderr
