"""`ctrsink study`: ordinary runs in folders, kept when the study is called again, baselines beside them, one comparison."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ctrsink.config import load_study
from ctrsink.dataset.reader import Dataset
from ctrsink.dataset.signal_tables import signal_columns
from ctrsink.errors import InputError
from ctrsink.evaluate.metrics import all_metrics
from ctrsink.evaluate.slices import facts
from ctrsink.studies.measured import read_predictions
from tests.command_line import call, content, good, refused
from tests.runs import prepared_data, run_tree

SHORT = ["stages.0.steps=2", "stages.1.steps=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("study") / "set"), users=40, per_user=20)


def write_signals(data: str, folder: Path) -> str:
    """Tables as `ctrsink data signals` writes them, of two numbers that are known to tell something."""
    folder.mkdir(parents=True)
    dataset, chance = Dataset(data), np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        found = facts(dataset, split)
        columns: dict[str, Any] = {"user": found.users, "event": found.events, "item": np.zeros(len(found.events), np.int32)}
        columns |= {"timestamp": found.times, "label": found.labels}
        columns["hint"] = (found.labels + chance.normal(size=len(found.labels))).astype(np.float32)
        columns["history"] = found.history.astype(np.float32)
        table = pa.table(columns)
        pq.write_table(table.take(chance.permutation(table.num_rows)), folder / f"{split}.parquet")
    return str(folder)


def write_study(folder: Path, data: str, **changes: Any) -> Path:
    """A study of two variants and two seeds; returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(run_tree(data, "unused")))
    rates = "sink: 0.01, head: 0.01"
    plain = ["model.bias=null", "stages.0.trainable=[sink, head]", f"stages.0.lr={{{rates}}}"]
    plain += ["stages.1.trainable=[sink, head, backbone]", f"stages.1.lr={{{rates}, backbone: 0.003}}"]
    study = {
        "folder": str(folder / "study"),
        "base": "run.yaml",
        "overrides": SHORT,
        "variants": {"bias": [], "plain": plain},
        "seeds": [0, 1],
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study | changes))
    return folder / "study.yaml"


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """File and result of a study with every baseline."""
    folder = tmp_path_factory.mktemp("finished")
    signals = write_signals(data, folder / "signals")
    path = write_study(folder, data, baselines=["item_mean", "logistic", "lightgbm"], stacked=["plain"], signals=signals)
    return path, good("study", "--config", path)


def test_every_variant_and_seed_is_an_ordinary_run(finished: tuple[Path, dict[str, Any]]) -> None:
    path, found = finished
    folder = path.parent / "study"
    assert found["folder"] == str(folder)
    assert found["equal_budget"]
    for name in ("bias", "plain"):
        assert found["variants"][name]["seeds"] == [0, 1]
        assert found["variants"][name]["trained"]["steps"] == 4
        for seed in (0, 1):
            run = folder / name / f"seed-{seed}"
            assert good("evaluate", "--run", run, "--split", "valid")["evaluation"]["valid"]["impressions"] > 0
            config = yaml.safe_load((run / "config.yaml").read_text())
            assert (config["name"], config["seed"], config["run_dir"]) == (name, seed, str(run))
    assert yaml.safe_load((folder / "plain/seed-0/config.yaml").read_text())["model"]["bias"] is None


def test_baselines_and_stacks_stand_beside_the_runs_on_the_same_impressions(finished: tuple[Path, dict[str, Any]]) -> None:
    path, found = finished
    folder = path.parent / "study"
    assert list(found["variants"]) == ["item_mean", "logistic", "lightgbm", "bias", "plain", "plain-stacked"]
    seeds = [variant["seeds"] for variant in found["variants"].values()]
    assert seeds == [[None], [None], [0, 1], [0, 1], [0, 1], [0, 1]]
    table = read_predictions(str(folder / "logistic"), "test")
    users = np.array(table["user"].to_pylist())
    expected = all_metrics(table["label"].to_numpy(), table["probability"].to_numpy(), users)
    assert found["variants"]["logistic"]["metrics"]["auc"]["mean"] == pytest.approx(expected["auc"])
    assert expected["auc"] > 0.7 > found["variants"]["item_mean"]["metrics"]["auc"]["mean"]
    assert found["baseline"] == "bias"
    assert found["variants"]["logistic"]["difference"]["auc"]["pairs"] == 2
    assert found["variants"]["item_mean"]["trained"]["seconds"] >= 0
    assert found["variants"]["plain-stacked"]["trained"]["seconds"] > found["variants"]["plain"]["trained"]["seconds"]
    chosen = json.loads((folder / "logistic/result.json").read_text())["chosen"]
    assert chosen["strength"] > 0


def test_without_a_folder_of_signals_they_are_those_of_the_data_set(data: str, tmp_path: Path) -> None:
    """What targets can be told, and nothing that tells the outcome."""
    path = write_study(tmp_path, data, variants={"bias": []}, seeds=[0], baselines=["logistic"], compare_with="logistic")
    found = good("study", "--config", path)
    assert list(found["variants"]) == ["logistic", "bias"]
    assert 0 < found["variants"]["logistic"]["metrics"]["auc"]["mean"] < 0.95
    columns = signal_columns(Dataset(data))["test"].column_names
    assert {"item_mean", "item_count", "user_res", "hour"} <= set(columns)
    assert not {"deviation", "feedback"} & set(columns)


def test_the_folder_holds_the_comparison_and_its_figures(finished: tuple[Path, dict[str, Any]]) -> None:
    path, found = finished
    folder = path.parent / "study"
    assert {Path(file).name for file in found["files"]} == {"study.json", "metrics.png", "slices.png"}
    written = json.loads((folder / "study.json").read_text())
    assert written["study"]["seeds"] == [0, 1]
    assert written["variants"] == found["variants"]
    runs = [*folder.glob("plain/*"), *folder.glob("bias/*"), folder / "lightgbm/seed-0"]
    again = good("compare", *runs, "--baseline", folder / "bias/seed-0")
    assert again["variants"]["plain"] == found["variants"]["plain"]


def test_a_finished_study_keeps_every_run_and_baseline(finished: tuple[Path, dict[str, Any]]) -> None:
    path, found = finished
    before = content(path.parent / "study")
    assert good("study", "--config", path) == found
    assert content(path.parent / "study") == before


def test_a_study_that_was_stopped_goes_on_with_the_run_it_was_in(
    data: str, finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctrsink.studies import study

    path = write_study(tmp_path, data)
    calls: list[tuple[str, int]] = []

    def interrupted(spec: Any, resume: bool) -> dict[str, Any]:
        calls.append((spec.name, spec.seed))
        return start(spec, resume, stop_after=3 if len(calls) == 2 else None)

    start = study.start
    monkeypatch.setattr(study, "start", interrupted)
    shown = good("study", "--config", path)
    assert shown == {"folder": str(tmp_path / "study"), "stopped": None, "finished": 1}
    kept = content(tmp_path / "study/bias/seed-0")
    found = good("study", "--config", path)
    assert calls == [("bias", 0), ("plain", 0), ("plain", 0), ("bias", 1), ("plain", 1)]
    assert content(tmp_path / "study/bias/seed-0") == kept
    # As if nothing had been.
    for name in ("bias", "plain"):
        assert found["variants"][name]["metrics"] == finished[1]["variants"][name]["metrics"]


def test_a_changed_study_is_refused_and_more_seeds_are_not(data: str, finished: tuple[Path, dict[str, Any]]) -> None:
    path, _ = finished
    before = content(path.parent / "study")
    tree = yaml.safe_load(path.read_text())
    changed = path.parent / "changed.yaml"
    changed.write_text(yaml.safe_dump(tree | {"overrides": [*SHORT, "train.weight_decay=0.5"]}))
    line = refused(call("study", "--config", changed), "the study was changed", "train.weight_decay was 0.01, is 0.5", "--to")
    assert str(path.parent / "study/bias/seed-0") in line
    assert content(path.parent / "study") == before
    changed.write_text(yaml.safe_dump(tree | {"seeds": [1], "split": "valid", "baselines": [], "stacked": []}))
    found = good("study", "--config", changed)
    assert (found["split"], found["variants"]["bias"]["seeds"]) == ("valid", [1])


def test_signals_of_another_data_set_are_refused(data: str, tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    path, _ = finished
    tree = yaml.safe_load(path.read_text())
    other = prepared_data(str(tmp_path / "other"), users=30, per_user=16)
    own = path.parent / "other-signals.yaml"
    own.write_text(yaml.safe_dump(tree | {"signals": write_signals(other, tmp_path / "signals")}))
    refused(call("study", "--config", own), "these are not the impressions that the runs were measured on")
    good("study", "--config", path)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"variants": {"a b": []}}, ["variants.a b", "should match pattern"]),
        ({"variants": {}}, ["variants: "]),
        ({"variants": {"x": ["train.batch_sze=4"]}}, ["variants.x: ", "unknown key train.batch_sze, did you mean batch_size?"]),
        ({"variants": {"x": "none.yaml"}}, ["variants.x: cannot read the configuration", "none.yaml"]),
        ({"base": None}, ["base is missing"]),
        ({"seeds": [1, 1]}, ["seeds: one stands twice"]),
        ({"sedes": [1]}, ["unknown key sedes, did you mean seeds?"]),
        ({"baselines": ["catboost"]}, ["baselines.0: 'catboost' is not allowed"]),
        ({"stacked": ["other"], "signals": "x"}, ["stacked: there is no variant other (allowed: bias, plain)"]),
        ({"variants": {"item_mean": []}, "baselines": ["item_mean"]}, ["a name is that of a baseline"]),
        ({"compare_with": "other"}, ["compare_with: there is no other (allowed: bias, plain)"]),
        ({"overrides": ["evaluate.splits=[valid]"]}, ["variants.bias: evaluate.splits lacks test"]),
        ({"overrides": ["data.uri=none"]}, ["none holds no manifest.json"]),
        ({"baselines": ["lightgbm"], "signals": "no/such"}, ["signals no/such: there is no train.parquet"]),
    ],
)  # fmt: skip
def test_a_wrong_study_is_one_line_before_anything_is_trained(
    data: str, tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    refused(call("study", "--config", write_study(tmp_path, data, **changes)), *parts)
    assert not (tmp_path / "study").exists()


def test_a_variant_may_be_a_configuration_of_its_own(data: str, tmp_path: Path) -> None:
    path = write_study(tmp_path, data, base=None, variants={"own": "other.yaml"})
    (tmp_path / "other.yaml").write_text("include: [run.yaml]\ntrain: {batch_size: 16}\n")
    study, runs = load_study(path)
    assert study.names == ["own"]
    assert runs["own"].train.batch_size == 16
    assert runs["own"].stages[0].steps == 2  # the study's own overrides reach it
    (tmp_path / "signals").mkdir()
    buffer = io.BytesIO()
    pq.write_table(pa.table({"user": ["a"]}), buffer)
    for name, what in ((b"no parquet", "is damaged"), (buffer.getvalue(), "has no column event")):
        (tmp_path / "signals/train.parquet").write_bytes(name)
        wrong = write_study(tmp_path, data, baselines=["logistic"], signals=str(tmp_path / "signals"))
        refused(call("study", "--config", wrong), f"{tmp_path}/signals/train.parquet {what}")
    with pytest.raises(InputError, match=r"variants\.own"):
        load_study(write_study(tmp_path, data, variants={"own": "study.yaml"}))
