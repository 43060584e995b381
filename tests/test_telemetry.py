"""One row goes everywhere: metrics.jsonl, TensorBoard, gauges, and a real MLflow, whose troubles are not the training's."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.local.ports import free_ports
from ctrsink.config import RunSpec, parse_run
from ctrsink.dist import Topology
from ctrsink.errors import InputError
from ctrsink.families.protocol import Flops
from ctrsink.run.folder import MLFLOW_NAME, flatten
from ctrsink.train.observe import hardware
from ctrsink.train.observe.hardware import known_peak, over_ranks, peak_of
from ctrsink.train.observe.telemetry import Pace, Telemetry, read_metrics
from tests.builders import layout_of, random_batch, run_tree


def spec_of(run_dir: Path, **train: Any) -> RunSpec:
    return parse_run(run_tree(run_dir=str(run_dir), name="tea", train=train), "test")


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "stage": "one", "loss": 1 / step, **more}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def mlflow_run(database: str, run_dir: Path) -> Any:
    return MlflowClient(database).get_run((run_dir / MLFLOW_NAME).read_text())


def test_a_row_goes_everywhere_with_whatever_numbers_it_has(tmp_path: Path, database: str) -> None:
    seen: list[dict[str, Any]] = []
    telemetry = Telemetry(spec_of(tmp_path, mlflow={"tracking_uri": database}), 0, seen.append)
    rows = [row(1, **{"valid/auc": float("nan"), "checkpoint_s": 2}), row(2, **{"valid/auc": 0.75, "any thing/é": 3.5})]
    for made in rows:
        telemetry.add(made)
    telemetry.close(finished=True)
    assert seen == rows
    assert read_metrics(str(tmp_path)) == [rows[0] | {"valid/auc": None}, rows[1]]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert [(e.step, e.value) for e in board.Scalars("any thing/é")] == [(2, 3.5)]


def test_mlflow_has_the_configuration_and_the_rows_and_goes_on_with_the_run(tmp_path: Path, database: str) -> None:
    spec = spec_of(tmp_path, mlflow={"tracking_uri": database, "experiment": "drinks"})
    first = Telemetry(spec, 0)
    first.add(row(1, **{"valid/auc": float("nan"), "lr/head": 0.1}))
    first.add(row(2))
    first.close(finished=False)
    found = mlflow_run(database, tmp_path)
    assert (found.info.run_name, found.info.status) == ("tea", "KILLED")
    assert found.data.params == {key: str(value) for key, value in flatten(spec.model_dump(mode="json")).items()}
    assert found.data.params["stages.0.lr.head"] == "0.02"
    assert found.data.metrics == {"loss": 0.5, "lr/head": 0.1}
    # What may differ in a continuation does no harm to it, although MLflow lets no parameter change.
    second = Telemetry(spec_of(tmp_path, mlflow={"tracking_uri": database, "experiment": "drinks"}, log_every=3), 2)
    second.add(row(4))
    second.close(finished=True)
    again = mlflow_run(database, tmp_path)
    assert (again.info.run_id, again.info.status) == (found.info.run_id, "FINISHED")
    client = MlflowClient(database)
    assert [(m.step, m.value) for m in client.get_metric_history(again.info.run_id, "loss")] == [(1, 1.0), (2, 0.5), (4, 0.25)]
    experiment = client.get_experiment_by_name("drinks")
    assert experiment is not None
    assert again.info.experiment_id == experiment.experiment_id


def test_a_run_that_mlflow_does_not_know_any_more_begins_anew_there(tmp_path: Path, database: str) -> None:
    (tmp_path / MLFLOW_NAME).write_text("0" * 32)
    telemetry = Telemetry(spec_of(tmp_path, mlflow={"tracking_uri": database}), 1)
    telemetry.add(row(3))
    telemetry.close(finished=True)
    assert mlflow_run(database, tmp_path).data.metrics["loss"] == 1 / 3


def test_mlflow_that_cannot_be_reached_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_ports(1)[0]}"
    telemetry = Telemetry(spec_of(tmp_path, mlflow={"tracking_uri": uri}), 0)
    for step in range(1, 5):
        telemetry.add(row(step))
    telemetry.close(finished=True)
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [1, 2, 3, 4]
    of_training = [record for record in heard.records if record.name == "ctrsink.train"]
    (warning,) = [record.getMessage() for record in of_training if record.levelno >= logging.WARNING]
    assert warning.startswith("MLflow does not take the metrics, training goes on without it: ")


def test_a_missing_mlflow_is_said_before_anything_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match=r"train\.mlflow needs the package mlflow: pip install 'ctrsink\[mlflow\]'"):
        Telemetry(spec_of(tmp_path, mlflow={"tracking_uri": "https://host"}), 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("https://me:hush-hush@host", "MLFLOW_TRACKING_PASSWORD in the environment"),
        ("https://hush-hush@host", "MLFLOW_TRACKING_PASSWORD in the environment"),
        ("postgresql://me:hush-hush@host/db", "MLFLOW_TRACKING_PASSWORD in the environment"),
        ("postgresql://host/db?password=hush-hush", "MLFLOW_TRACKING_PASSWORD in the environment"),
        ("https://me:hush-hush@[host", "this is no URI"),
        ("sqlite:///hush-hush.db", "write sqlite:////absolute/mlflow.db"),
        ("hush-hush", "give a URI such as https://HOST"),
    ],
)
def test_a_secret_or_a_place_that_workers_do_not_share_is_refused(uri: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.mlflow\.tracking_uri: ") as refused:
        spec_of(tmp_path, mlflow={"tracking_uri": uri})
    assert why in str(refused.value)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("uri", ["https://host:5000/base", "postgresql://me@host/db", "sqlite:////var/mlflow.db"])
def test_places_without_a_secret_are_taken(uri: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, mlflow={"tracking_uri": uri}).train.mlflow
    assert spec is not None
    assert spec.tracking_uri == uri


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10", None),
        ("Tesla T4", None),
    ],
)
def test_peak_of_a_gpu_is_that_of_its_data_sheet_or_unknown(name: str, peak: float | None) -> None:
    assert known_peak(name) == peak


def test_no_peak_no_share() -> None:
    batch = random_batch(1, layout_of(), (5, 3))
    pace = Pace(lambda batch: Flops(10**10 * batch.tokens, 0))
    pace.count(8, [batch, batch], 0.0)
    report = pace.report(None)
    assert report["tflops"] == pytest.approx(report["tokens_per_s"] / 100)
    assert "seconds_left" not in report
    assert (peak_of("cpu", None), peak_of("cpu", 0.5), peak_of("cuda", 7.0)) == (None, 0.5, 7.0)
    assert "mfu" not in over_ranks(report, None, Topology())
    told = over_ranks(report, 0.5, Topology())
    assert told["mfu"] == pytest.approx(report["tflops"] / 0.5)
    assert 0.05 < told["memory_gib/rank0"] < 50
    assert not any(key.startswith("gpu") for key in told)


@pytest.mark.parametrize(("world", "keys"), [(2, {"memory_gib/rank0", "memory_gib/rank1"}), (9, {"memory_gib/max"})])
def test_ranks_are_summed_and_a_large_world_keeps_rows_short(world: int, keys: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of `world` ranks, of which rank r has r + 1 times the tokens."""

    def gathered(rows: Any, topology: Topology) -> Any:
        return np.concatenate([rows * (rank + 1) for rank in range(topology.world)])

    monkeypatch.setattr(hardware, "gather_rows", gathered)
    told = over_ranks({"tokens_per_s": 10.0, "tflops": 2.0, "data_wait": 0.1}, 4.0, Topology(world=world))
    total = world * (world + 1) / 2
    assert told["tokens_per_s"] == pytest.approx(10 * total)
    assert told["data_wait"] == pytest.approx(0.1 * world)
    assert told["mfu"] == pytest.approx(2 * total / (4 * world))
    assert {key for key in told if key.startswith("memory")} == keys
    assert json.dumps(told)
