"""Code of a model on the hub runs only at the commit that somebody has read."""

import json
from pathlib import Path

import pytest

from ctrsink.config import parse_run
from ctrsink.config.model import DecoderSpec
from ctrsink.errors import InputError
from ctrsink.families.decoder.build import backbone_config
from tests.runs import run_tree
from tests.test_config_files import CONFIGS


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "1" * 39, "g" * 40])
def test_code_of_the_hub_runs_at_a_commit_alone(revision: str | None) -> None:
    tree = run_tree("data", "run")
    tree["model"] |= {"backbone": {"path": "org/tiny", "revision": revision}, "trust_remote_code": True}
    with pytest.raises(InputError, match=r"set backbone\.revision to the commit"):
        parse_run(tree, "test")
    tree["model"]["backbone"]["revision"] = "1" * 40
    model = parse_run(tree, "test").model
    assert isinstance(model, DecoderSpec)
    assert model.trust_remote_code


def test_no_configuration_here_runs_code_of_the_hub() -> None:
    assert not [path for path in CONFIGS.rglob("*.yaml") if "trust_remote_code" in path.read_text("utf-8")]


@pytest.mark.parametrize("places", ["evil/code--model.Config", [None, "evil/code--model.Slow"]])
def test_code_of_another_repository_is_no_commit_of_this_one(tmp_path: Path, places: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": places}}))
    tree = run_tree("data", "run")
    tree["model"] |= {"backbone": {"path": str(tmp_path)}, "trust_remote_code": True}
    model = parse_run(tree, "test").model
    assert isinstance(model, DecoderSpec)
    with pytest.raises(InputError, match=r"takes its code .AutoConfig. from another repository, evil/code, at no commit"):
        backbone_config(model, 100)
