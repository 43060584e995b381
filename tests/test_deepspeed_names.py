"""Every name of DeepSpeed that is no part of its interface and that is used: a version that renames one fails here by name."""

import importlib
import inspect
import math
import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

import ctrsink.train.deepspeed_import  # noqa: F401  (DeepSpeed as the engine imports it)
from ctrsink.dist import Topology
from ctrsink.train.engine import Engine

ZERO_12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
ZERO_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
# Where a name is defined, and the files of ours that use it.
NAMES = {
    "deepspeed.utils.groups:_WORLD_GROUP": "engine",
    "deepspeed.ops:__compatible_ops__": "deepspeed_import",
    "deepspeed.runtime.utils:combine_grad_norm_groups": "stage_tables",
    "deepspeed.utils.tensor_fragment:safe_get_local_optimizer_state": "engine",
    "deepspeed.utils.tensor_fragment:safe_set_local_optimizer_state": "engine",
    "deepspeed.utils.tensor_fragment:safe_set_full_optimizer_state": "engine",
    "deepspeed.utils.tensor_fragment:safe_set_local_fp32_param": "engine",
    f"{ZERO_12}._lazy_init_hp_params_optimizer_state": "engine, native",
    f"{ZERO_12}.scaled_global_norm": "stage_tables",
    f"{ZERO_3}._get_norm_groups": "stage_tables",
    "deepspeed.runtime.engine:DeepSpeedEngine.set_gradient_accumulation_boundary": "engine",
    "deepspeed.runtime.engine:DeepSpeedEngine.get_global_grad_norm": "engine",
    "deepspeed.runtime.engine:DeepSpeedEngine.destroy": "engine",
    "deepspeed.checkpoint.ds_to_universal:main": "native",
}
# Attributes that a constructor makes: looked for in the source that makes them.
MADE = {
    (ZERO_12, "optimizer"): "engine",
    (ZERO_12, "check_grad_overflow"): "engine",
    (ZERO_12, "_hp_optimizer_states_linked"): "native",
    (ZERO_3, "optimizer"): "engine",
    (ZERO_3, "fp32_partitioned_groups_flat"): "engine",
    (ZERO_3, "sub_group_to_group_id"): "engine",
    ("deepspeed.runtime.engine:DeepSpeedEngine", "checkpoint_engine"): "native",
    ("deepspeed.runtime.zero.partition_parameters:Init", "ds_tensor"): "engine",
    ("deepspeed.runtime.zero.partition_parameters:Init", "ds_shape"): "engine",
    ("deepspeed.runtime.zero.partition_parameters:Init", "ds_numel"): "engine",
}
# Keys of the configuration that its documentation does not have.
KEYS = {"zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer"}


def found(name: str) -> Any:
    module, _, path = name.partition(":")
    value = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_there(name: str, repository: Path) -> None:
    found(name)
    last = re.split(r"[.:]", name)[-1]
    for user in NAMES[name].split(", "):
        assert re.search(rf"\b{last}\b", source_of(user, repository)), f"{user} does not use {last} any more: leave it out here"


@pytest.mark.parametrize(("of", "name"), MADE, ids=lambda part: part.rpartition(":")[2])
def test_an_attribute_is_made(of: str, name: str, repository: Path) -> None:
    assert re.search(rf"\.{name}\s*(:[^=]+)?=[^=]", inspect.getsource(inspect.getmodule(found(of)))), f"{of} makes no {name}"  # pyright: ignore[reportArgumentType]
    assert re.search(rf"\b{name}\b", source_of(MADE[of, name], repository)), f"leave {name} out here"


def test_a_key_is_read() -> None:
    constants = Path(inspect.getfile(importlib.import_module("deepspeed.runtime.constants"))).read_text()
    assert [key for key in sorted(KEYS) if f'"{key}"' not in constants] == []


def test_every_underscored_name_of_an_engine_or_optimizer_stands_here(repository: Path) -> None:
    used = set()
    for path in (repository / "ctrsink/train").rglob("*.py"):
        used |= set(re.findall(r"\b(?:deepspeed|optimizer|groups)\.(_\w+)", path.read_text()))
    listed = {re.split(r"[.:]", name)[-1] for name in NAMES} | {name for _, name in MADE}
    assert used
    assert used <= listed | {"__compatible_ops__"}


def test_arguments_of_the_converter_are_those_that_it_reads() -> None:
    parser = inspect.getsource(importlib.import_module("deepspeed.checkpoint.ds_to_universal"))
    for name in ("input_folder", "output_folder", "num_extract_workers", "num_merge_workers", "keep_temp_folder", "strict"):
        assert f"args.{name}" in parser or f"'--{name}'" in parser, name
    assert "args.inject_missing_state" in parser


def test_deepspeed_is_pinned_to_the_version_whose_names_these_are(repository: Path) -> None:
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pinned,) = (r for r in map(Requirement, extras["train"]) if r.name == "deepspeed")
    assert str(pinned.specifier) == f"=={version('deepspeed')}"


def source_of(name: str, repository: Path) -> str:
    (path,) = (repository / "ctrsink/train").rglob(f"{name}.py")
    return path.read_text()


def test_what_a_share_is_filled_up_with_is_not_taken_for_weights() -> None:
    """DeepSpeed leaves there what the memory held before: a NaN of somebody else's would end the run as diverged."""

    def own(rank: int, parameter: Any) -> torch.Tensor:
        engine: Any = SimpleNamespace(topology=Topology(rank, 3))
        return Engine._own_values(engine, parameter)

    shares = [1.0, 2.0], [3.0, math.nan], [math.nan, math.nan]
    parameters = [SimpleNamespace(ds_tensor=torch.tensor(share), ds_numel=3) for share in shares]
    assert [own(rank, parameter).tolist() for rank, parameter in enumerate(parameters)] == [[1, 2], [3], []]
    plain = torch.ones(2)
    assert own(0, plain) is plain
