"""The readable program trains what `ctrsink train` trains: the same losses, step by step, through two stages."""

import json
from pathlib import Path
from typing import Any

import pytest

from ctrsink.config import parse_run
from ctrsink.errors import InputError
from ctrsink.runtime.start import start
from launchers.one_process import train
from tests.runs import prepared_data, run_tree
from tests.test_families_runs import tree_of

ALONE: dict[str, Any] = {"runtime": {"kind": "local", "workers": 1}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("one") / "data"))


@pytest.mark.parametrize("family", ["decoder", "srp"])
def test_losses_are_those_of_a_run(family: str, data: str, tmp_path: Path) -> None:
    options = {"zero_stage": 0, "weight_decay": 0.5}
    if family == "decoder":
        tree = run_tree(data, str(tmp_path / "run"), train=options, **ALONE)
        for stage, steps in zip(tree["stages"], (3, 3), strict=True):
            stage["steps"] = steps
    else:
        tree = tree_of("srp", data, str(tmp_path / "run"), "per_target", train=options)
    spec = parse_run(tree, "test")
    start(spec)
    expected = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = [line.split() for line in train(spec, str(tmp_path / "model.safetensors"))]
    assert [(int(f[1]), f[3]) for f in found] == [(row["step"], row["stage"]) for row in expected]
    for line, row in zip(found, expected, strict=True):
        assert float(line[5]) == pytest.approx(row["loss"], rel=2e-5)
    assert (tmp_path / "model.safetensors").stat().st_size > 1000


def test_what_it_leaves_out_is_refused(data: str, tmp_path: Path) -> None:
    spec = parse_run(run_tree(data, str(tmp_path / "run"), train={"precision": "auto"}, **ALONE), "test")
    with pytest.raises(InputError, match=r"train\.precision auto"):
        next(iter(train(spec, str(tmp_path / "model.safetensors"))))
