"""Whose a run's folder is, and what may change when a run is continued."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ctrsink.config import RunSpec, parse_run
from ctrsink.config.load import merge
from ctrsink.errors import InputError
from ctrsink.run.folder import CONFIG_NAME, DATA_NAME, claim, first_difference, read_result, read_run, write_result
from tests.builders import run_tree
from tests.conftest import BUCKET


def run_in(folder: Path | str, **changes: Any) -> RunSpec:
    return parse_run(merge(run_tree(run_dir=str(folder)), changes), "x")


def stages(rate: float = 0.02, steps: int = 4) -> list[dict[str, Any]]:
    return [{"name": "one", "trainable": ["sink", "head"], "lr": {"sink": 0.01, "head": rate}, "steps": steps}]


def test_a_claimed_folder_holds_the_configuration(tmp_path: Path) -> None:
    spec = run_in(tmp_path / "new/run")
    claim(spec, resume=False, datasets=("d",))
    assert read_run(spec.run_dir) == spec
    assert {p.name for p in (tmp_path / "new/run").iterdir()} == {CONFIG_NAME, DATA_NAME}


def test_a_run_is_not_overwritten_without_resume(tmp_path: Path) -> None:
    claim(run_in(tmp_path), resume=False, datasets=("d",))
    with pytest.raises(InputError, match=r"already holds a run: give --resume to continue it, or choose another run_dir"):
        claim(run_in(tmp_path), resume=False, datasets=("d",))
    claim(run_in(tmp_path), resume=True, datasets=("d",))


def test_resume_without_a_run_starts_one(tmp_path: Path) -> None:
    claim(run_in(tmp_path / "fresh"), resume=True, datasets=("d",))
    assert read_run(str(tmp_path / "fresh")).stages[0].steps == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": stages(rate=0.5)}, "stages.0.lr.head was 0.02, is 0.5"),
        ({"stages": stages(steps=9)}, "stages.0.steps was 4, is 9"),
        ({"stages": [*stages(), stages()[0] | {"name": "two"}]}, "stages.1."),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"train": {"batch_size": 64}}, "train.batch_size was 32, is 64"),
        ({"train": {"weight_decay": 0.5}}, "train.weight_decay was 0.01, is 0.5"),
        ({"data": {"history": 3}}, "data.history was 50, is 3"),
        (
            {"model": {"sinks": {"signals": ["none"]}}},
            "model.sinks.signals was ['feedback', 'deviation', 'item_mean', 'item_count'], is ['none']",
        ),
        ({"data": {"text_history": 5}}, "data.text_history was None, is 5"),
        ({"model": {"target": {}}}, "model.target"),
        ({"model": {"bias": None}}, "model.bias"),
        ({"model": {"lora": {"rank": 4}}}, "model.lora"),
        ({"model": {"backbone": {"config": {"hidden_size": 8}}}}, "model.backbone.config.hidden_size was None, is 8"),
    ],
)
def test_a_run_that_computes_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    claim(run_in(tmp_path), resume=False, datasets=("d",))
    with pytest.raises(InputError) as caught:
        claim(run_in(tmp_path, **changes), resume=True, datasets=("d",))
    assert f"{tmp_path} belongs to another configuration: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert read_run(str(tmp_path)) == run_in(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"runtime": {"kind": "ray", "workers": 2}},
        {"train": {"zero_stage": 3, "micro_batch_size": 2, "checkpoint_every": 1, "log_every": 1}},
        {"train": {"checkpoint_format": "native", "keep": {"last": 3}}},
        {"evaluate": {"splits": ["test"]}},
        {"data": {"uri": "s3://moved/data"}},
        {"name": "another"},
        {"model": {"gradient_checkpointing": True}},
        {"prepare": {"source": {"path": "log"}, "tokenizer": {"train_vocabulary": 400}}},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_a_run_goes_on_elsewhere(tmp_path: Path, changes: dict[str, Any]) -> None:
    claim(run_in(tmp_path), resume=False, datasets=("d",))
    moved = run_in(tmp_path, **changes)
    claim(moved, resume=True, datasets=("d",))
    assert read_run(str(tmp_path)) == moved


def test_what_is_compared_is_everything_but_a_few_keys(tmp_path: Path) -> None:
    """Keys that merely begin like a free one are compared."""
    spec = run_in(tmp_path)
    assert first_difference(spec, spec) is None
    assert first_difference(spec, run_in(tmp_path, train={"micro_batch_size": 4})) is None
    assert first_difference(spec, run_in(tmp_path, train={"batch_size": 8})) == "train.batch_size was 32, is 8"


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path} holds no run"):
        read_run(str(tmp_path))


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"- 1", b""])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(InputError, match=CONFIG_NAME) as caught:
        claim(run_in(tmp_path), resume=True, datasets=("d",))
    assert "\n" not in str(caught.value)
    assert (tmp_path / CONFIG_NAME).read_bytes() == content


def test_a_result_comes_back(tmp_path: Path) -> None:
    result = {"steps": 3, "finished": True, "evaluation": {"test": {"auc": 0.7}}}
    write_result(str(tmp_path), result)
    assert read_result(str(tmp_path)) == result


RACE = """
import os, sys
from ctrsink import storage
from ctrsink.errors import InputError
from ctrsink.run.folder import claim
from tests.test_rundir import run_in
for base in sys.argv[1:]:
    for number in range(10):
        gate, (told, telling) = os.pipe(), os.pipe()
        for process in range(2):
            if os.fork() == 0:
                os.close(gate[1])
                spec = run_in(f"{base}/{number}", seed=process)
                storage.exists(base)  # makes the client
                os.read(gate[0], 1)  # both go on at once, when it is closed
                try:
                    os.write(telling, b"new " if claim(spec, False, (f"data {process}",)) else b"old ")
                except InputError as error:
                    os.write(telling, b"refused " if "already holds a run" in str(error) else b"failed ")
                os._exit(0)
        os.close(telling)
        os.close(gate[1])
        os.wait(), os.wait()
        print(*sorted(os.read(told, 100).decode().split()), storage.read_bytes(f"{base}/{number}/data.sha256").decode())
"""


@pytest.mark.usefixtures("s3_server")
def test_of_two_runs_that_start_together_one_has_the_folder(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path), f"s3://{BUCKET}/claims"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    places = [f"{base}/{number}" for base in (tmp_path, f"s3://{BUCKET}/claims") for number in range(10)]
    for line, place in zip(done.stdout.splitlines(), places, strict=True):
        assert line == f"new refused data {read_run(place).seed}"


def test_a_claim_that_was_cut_off_is_taken_up(tmp_path: Path) -> None:
    claim(run_in(tmp_path), resume=False, datasets=("d",))
    (tmp_path / DATA_NAME).unlink()
    assert not claim(run_in(tmp_path), resume=True, datasets=("d",))
    assert (tmp_path / DATA_NAME).read_text() == "d"
