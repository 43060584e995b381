"""Whose a run's folder is, and what may change when a run is continued."""

from pathlib import Path
from typing import Any

import pytest

from ctrsink.config import RunSpec, parse_run
from ctrsink.config.load import merge
from ctrsink.errors import InputError
from ctrsink.train.rundir import CONFIG_NAME, DATA_NAME, claim, first_difference, read_result, read_run, write_result
from tests.builders import run_tree


def run_in(folder: Path, **changes: Any) -> RunSpec:
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
        ({"model": {"sinks": {"signals": ["none"]}}}, "model.sinks.signals was ['previous_gap'], is ['none']"),
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
