"""A run folder that ctrsink wrote in November 2026, before its files had versions: the present one reads it and goes on with it.

`golden/run-without-versions` is such a run of six steps, stopped after four; `run-without-versions.json` beside it has what the
program of that day made of the other two. Bytes of Parquet, and so the identity of a data set, depend on pyarrow: the data
set is prepared anew, and its identity put where the folder has that of its own.
"""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctrsink import kept
from ctrsink.config import parse_run
from ctrsink.dataset.manifest import read_manifest
from ctrsink.errors import InputError
from ctrsink.export.package import export_run
from ctrsink.families.registry import family_of
from ctrsink.run import repeats
from ctrsink.run.folder import read_result
from ctrsink.runtime.start import start
from ctrsink.train.checkpoint.checkpoint import MARKER, STATE, find_checkpoint
from ctrsink.train.observe.telemetry import read_metrics
from tests.command_line import call, refused
from tests.runs import prepared_data

STEP = "checkpoints/step-00000004"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("old") / "data"), users=12, per_user=10)


@pytest.fixture
def run(data: str, tmp_path: Path, repository: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(repository / "tests/golden/run-without-versions", folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("RUN", str(folder)).replace("DATA", data))
    identity = read_manifest(data).identity
    (folder / "data.sha256").write_text(identity)
    change(folder / STEP / STATE, dataset=identity)
    sealed(folder)
    return folder


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sealed(folder: Path) -> None:
    """The marker of the checkpoint, with the state as it is now."""
    state = (folder / STEP / STATE).read_bytes()
    change(folder / STEP / MARKER, **{STATE: {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}})


def test_none_of_its_files_has_a_version(repository: Path) -> None:
    files = list((repository / "tests/golden/run-without-versions").rglob("*.json"))
    assert {path.name for path in files} == {"result.json", "best.json", "state.json", "complete.json", "rank-0.json"}
    assert [path for path in files if "version" in json.loads(path.read_text())] == []


def test_every_file_of_it_is_read(run: Path) -> None:
    assert read_result(str(run)) | {"seconds": 0} == {
        "steps": 4, "finished": False, "stopped": None, "impressions": 100, "checksum": "dce48a16f9534eee", "skipped": 0,
        "seconds": 0, "evaluation": {},
    }  # fmt: skip
    assert repeats.given_up(str(run)) == "rank 0, step 5, stage all: out of memory (3 times)"
    checkpoint = find_checkpoint(str(run), "best")
    assert (checkpoint.step, checkpoint.position, checkpoint.precision) == (4, 32, "")
    assert checkpoint.steps["backbone/decay"] == 2
    assert {name for name in checkpoint.moments if name.startswith("head.")}
    assert export_run(str(run), str(run.parent / "model"))["step"] == 4


def test_it_goes_on_as_it_would_have_gone_on_then(run: Path, repository: Path) -> None:
    expected = json.loads((repository / "tests/golden/run-without-versions.json").read_text())
    spec = parse_run(yaml.safe_load((run / "config.yaml").read_text()), "the old run")
    result = start(spec, resume=True)
    assert (result["steps"], result["impressions"], result["checksum"]) == (6, expected["impressions"], expected["checksum"])
    assert [row["loss"] for row in read_metrics(str(run))[4:]] == pytest.approx(expected["losses"], rel=1e-5)
    for name, value in expected["evaluation"]["valid"].items():
        assert result["evaluation"]["valid"][name] == pytest.approx(value, rel=1e-4), name
    written = [run / "result.json", *run.glob("checkpoints/step-00000006/*.json")]
    assert len(written) == 3
    assert [json.loads(path.read_text())["version"] for path in written] == [kept.VERSION] * 3


def test_a_version_that_is_not_known_yet_is_refused_with_what_to_do(run: Path) -> None:
    change(run / STEP / STATE, version=kept.VERSION + 1)
    sealed(run)
    line = f"{run / STEP / STATE} was written by a newer ctrsink (version 2, this one reads up to 1): go on with that one"
    refused(call("train", "--config", run / "config.yaml", "--resume"), line)


def test_a_native_checkpoint_with_names_of_before_is_refused(run: Path) -> None:
    earlier = family_of("decoder").earlier_names
    checkpoint = find_checkpoint(str(run))
    before = set(checkpoint.parameters)
    assert any(name.startswith("sinks.tables.") for name in before)
    present = checkpoint.under_present_names(earlier)
    assert {name.replace("sinks.categories.", "sinks.") for name in present.parameters} == before
    assert not any(name.startswith(tuple(earlier)) for name in (*present.parameters, *present.moments))
    assert present.under_present_names(earlier).parameters.keys() == present.parameters.keys()
    native = {"world": 2, "zero_stage": 3}
    assert replace(present, native=native).under_present_names(earlier).native == native
    with pytest.raises(InputError, match="the native checkpoint of step 4 was saved by an older ctrsink: finish"):
        replace(checkpoint, native=native).under_present_names(earlier)
