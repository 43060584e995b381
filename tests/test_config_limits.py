"""Configurations that grow, nest or lie: each ends at once in one line, and before anything is started."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctrsink.config import load_run, parse_run
from ctrsink.config.load import merge
from ctrsink.errors import InputError
from ctrsink.families.decoder.build import check_model
from ctrsink.run.folder import CONFIG_NAME, read_run
from tests import runs
from tests.builders import run_tree
from tests.command_line import call, refused

RUN = yaml.safe_dump(run_tree())
NINE = 9 * "{0}, "
BOMB = "x0: &x0 [a]\n" + "".join(f"x{i}: &x{i} [{NINE.format(f'*x{i - 1}')}]\n" for i in range(1, 12))
DOUBLED = "x0: &x0 {a: 1, b: 2}\n" + "".join(f"x{i}: &x{i}\n  <<: [*x{i - 1}, *x{i - 1}]\n" for i in range(1, 40))


def message(read: Callable[[], Any]) -> str:
    """The refusal: one line, within 2 s of this process, however long the input is."""
    began = time.process_time()
    with pytest.raises(InputError) as caught:
        read()
    assert time.process_time() - began < 2
    found = str(caught.value)
    assert "\n" not in found
    assert len(found) < 700
    return found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB + RUN.replace("model_type: llama", "model_type: llama\n      deep: *x11"), "more than 100,000 values"),
        (DOUBLED + RUN, "<< brings in more than 10000 keys|unknown key x0"),
        (RUN + "a: &a {<<: *a}\n", "unknown key a"),
        (RUN + "name: &n [*n]\n", "name.0.0: nested more than 50 levels deep, or an alias that contains itself"),
        (RUN + "train: &n {train: *n}\n", "train.train.train: nested more than 50 levels deep"),
        (RUN + f"name: {'[' * 500}{']' * 500}\n", "nested more than 50 levels deep"),
        (RUN + f"name: {'{a: ' * 500}1{'}' * 500}\n", "nested more than 50 levels deep"),
        (RUN + f"name: {'[' * 60}{']' * 60}\n", "nested more than 50 levels deep"),
        ("".join(f"{'  ' * i}a:\n" for i in range(200)), "nested more than 50 levels deep"),
        (RUN + "x" * 200_000, "a configuration of more than 128 KiB is none"),
        (RUN + "".join(f"k{i}: 1\n" for i in range(9000)), r"unknown key k0 .* \[and 8999 more\]"),
        (RUN.replace("runs/x", '"runs/\\0x"'), r"run_dir: 'runs/\\x00x' holds a NUL character"),
        ("include: [\"a\\0.yaml\"]\n" + RUN, r"include.0: 'a\\x00.yaml' holds a NUL character"),
        (RUN.replace("runs/x", '"runs/\\ud800x"'), r"run_dir: .* holds half a surrogate pair"),
        (RUN + "seed: " + "9" * 5000 + "\n", r"not valid YAML: Exceeds the limit \(4300 digits\)"),
        (RUN + "seed: 0x" + "f" * 50_000 + "\n", "seed: a whole number beyond 2.53 is out of range"),
        (RUN + "x: !!bool abc\n", "not valid YAML: a tag does not fit its value"),
        (RUN + "x: !!timestamp abc\n", "not valid YAML: a tag does not fit its value"),
        (RUN + "x: !!int ''\n", "not valid YAML: a tag does not fit its value"),
        (RUN + 'x: "\\UFFFFFFFF"\n', "not valid YAML: .* or a sign is none"),
        (RUN + "on: 3\n", "True is no name of a key: put it in quotes"),
        (RUN + "train: {clip_norm: .inf}\n", "train.clip_norm: the number inf is out of range"),
        (RUN + "train: {clip_norm: 'nan'}\n", "train.clip_norm: Input should be a finite number"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)  # fmt: skip
def test_a_text_that_grows_nests_or_holds_what_nothing_can_take_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, "utf-8")
    assert re.search(said, message(lambda: load_run(path)))


@pytest.mark.parametrize("date", ["2024-12-24", "2024-13-45"])
def test_a_date_stays_the_text_that_it_is(tmp_path: Path, date: str) -> None:
    (tmp_path / "run.yaml").write_text(RUN + f"name: {date}\n", "utf-8")
    assert load_run(tmp_path / "run.yaml").name == date


def test_overrides_and_the_configuration_in_a_run_folder_have_the_same_limits(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    assert "nested more than 50 levels deep" in message(lambda: load_run(path, ["seed=" + "[" * 500]))
    assert "a.a.a: nested more than 50 levels deep" in message(lambda: load_run(path, ["a." * 5000 + "a=1"]))
    assert "holds a NUL character" in message(lambda: load_run(path, ['run_dir="a\\0"']))
    (tmp_path / CONFIG_NAME).write_text(BOMB + RUN.replace("model_type: llama", "model_type: llama\n      deep: *x11"))
    assert "more than 100,000 values" in message(lambda: read_run(str(tmp_path)))
    (tmp_path / CONFIG_NAME).write_text("[" * 500)
    assert "nested more than 50 levels deep" in message(lambda: read_run(str(tmp_path)))


def test_a_file_name_with_a_nul_is_one_line() -> None:
    assert r"cannot read the configuration a\0.yaml: embedded null" in message(lambda: load_run("a\0.yaml"))


@pytest.mark.parametrize(
    "override",
    ["seed={0}", "{0}", "name=[{0}]", "data.examples={0}", "train.batch_size={0}", "{0}=1", "stages.0.lr.{0}=1", "data={0}",
     "runtime.workers={0}", "model.sinks.signals=[{0}]", "model.backbone.config.hidden_size={0}", "name={{{0}: 1}}"],
)  # fmt: skip
def test_a_value_of_100000_characters_is_not_repeated(tmp_path: Path, override: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)

    def read() -> None:
        check_model(load_run(path, [override.format("a" * 100_000)]).model, 300)

    found = message(read)
    assert "aaa" in found
    assert "a" * 310 not in found


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data=3", "run.yaml: data: Input should be a mapping of keys (got 3)"),
        ("stages=3", "run.yaml: stages: Input should be a list (got 3)"),
        ("stages=[]", "run.yaml: stages: List should have at least 1 item after validation, not 0 (got [])"),
        ("runtime.workers=x", "runtime.workers: Input should be a valid integer, unable to parse string as an integer (got 'x')"),
        ("runtime.workers={mn: 1}", "unknown key runtime.workers.mn, did you mean min? (allowed: min, max) [and 2 more]"),
        ("runtime.workers={min: 0, max: 3}", "run.yaml: runtime.workers"),
        ("train.micro_batch_tokens=x", "run.yaml: train.micro_batch_tokens: Input should be a valid integer"),
        ("stages.0.lr.hed=3", "run.yaml: stages.one: 'hed' is no group of the model, did you mean head? (allowed: sink, bias, "),
        ("train.betas=[-1, 0.95]", "run.yaml: train.betas.0: Input should be greater than or equal to 0 (got -1)"),
        ("train.betas=[0.9, 1]", "run.yaml: train.betas.1: Input should be less than 1 (got 1)"),
        ("train.betas=[0.9]", "run.yaml: missing key train.betas.1"),
        ("stages.7.lr=3", "override 'stages.7.lr=3': stages.7 does not exist: there are 2 stages, counted from 0"),
        ("stages={2: {name: c}}", "'stages={2: {name: c}}': stages.2 does not exist: there are 2 stages, counted from 0"),
        ("model.sinks.signals.1=none", "model.sinks.signals.1 does not exist: there is 1 entry in signals, counted from 0"),
        ("model.backbone.config.intermediate_size=0", "model.backbone.config: intermediate_size must be at least 1, got 0"),
        ("model.backbone.config.num_hidden_layers=1000000", "num_hidden_layers must be at most 1000, got 1e+06"),
        ("model.backbone.config.attention_dropout=1.0", "attention_dropout must be at least 0 and below 1, got 1"),
        ("stages.0.lr.head=1e38", "the rate of head must be at most 1e+37, got 1e+38"),
    ],
)  # fmt: skip
def test_messages_name_keys_and_nothing_of_pydantics(tmp_path: Path, override: str, said: str) -> None:
    tree = run_tree()
    tree["stages"].append(tree["stages"][0] | {"name": "two"})
    tree["model"]["sinks"] = {"signals": ["random"]}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    found = message(lambda: load_run(path, [override]))
    assert said in found
    for inner in ("Spec", "constrained", "instance", "tuple", "Tuple", "dictionary", "[key]", "function-"):
        assert inner not in found


def test_an_include_that_names_an_entry_too_many_is_told_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(RUN)
    (tmp_path / "run.yaml").write_text("include: [base.yaml]\nstages: {3: {lr: 1}}\n")
    assert "run.yaml: stages.3 does not exist: there is 1 entry in stages" in message(lambda: load_run(tmp_path / "run.yaml"))


NUMBERS = [
    "seed", "train.batch_size", "train.micro_batch_size", "train.checkpoint_every", "train.log_every", "stages.0.steps",
    "stages.0.batch_size", "data.history", "data.targets", "data.shuffle_shards", "data.cache.limit_mib", "model.sinks.buckets",
    "runtime.workers", "runtime.cpus_per_worker", "evaluate.batch_size", "model.backbone.config.hidden_size",
    "model.backbone.config.max_position_embeddings",
]  # fmt: skip


@pytest.mark.parametrize("number", ["1" + "0" * 30, "1e30", "'" + "9" * 30 + "'", "-1" + "0" * 30])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_that_no_worker_can_take_is_refused_where_it_is_read(tmp_path: Path, key: str, number: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)

    def read() -> None:
        check_model(load_run(path, [f"{key}={number}"]).model, 300)

    found = message(read)
    assert key.rpartition(".")[2] in found


def model_refused(**config: Any) -> str:
    tree = merge(runs.run_tree("data", "run"), {"model": {"backbone": {"config": config}}})
    return message(lambda: check_model(parse_run(tree, "x").model, 300))


def test_a_backbone_that_cannot_be_is_refused_without_its_memory() -> None:
    check_model(parse_run(runs.run_tree("data", "run"), "x").model, 300)
    assert "8e+18 parameters are more than any machine holds" in model_refused(hidden_size=10**9)
    assert "the model cannot be built (RuntimeError: Storage size calculation overflowed" in model_refused(hidden_size=10**15)
    assert "2 num_attention_heads cannot share 5 num_key_value_heads evenly" in model_refused(num_key_value_heads=5)
    assert "the model cannot be built (KeyError: 'zzz')" in model_refused(hidden_act="zzz")
    assert "expected int, got str" in model_refused(num_attention_heads="many")
    tree = merge(runs.run_tree("data", "run"), {"model": {"sinks": {"buckets": 10**15}}})
    assert "8e+15 of them in sinks.categories.tables.0.weight" in message(lambda: check_model(parse_run(tree, "x").model, 300))
    tree = merge(runs.run_tree("data", "run"), {"model": {"lora": {"targets": ["mlp"]}}})
    linear = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    found = message(lambda: check_model(parse_run(tree, "x").model, 300))
    assert found == f"model.lora.targets ['mlp']: the linear layers of LlamaModel are {linear}"


def test_a_run_with_such_a_backbone_never_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Ray no worker is started, and no folder is claimed."""
    data = runs.prepared_data(str(tmp_path / "set"), users=8, per_user=8)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(runs.run_tree(data, str(tmp_path / "run"), runtime={"kind": "ray", "workers": 2})))

    def train(*_: Any) -> None:
        raise AssertionError("workers were started")

    monkeypatch.setattr("ctrsink.runtime.start._train", train)
    refused(call("train", "--config", path, "model.backbone.config.num_key_value_heads=5"), "cannot share 5")
    refused(call("train", "--config", path, "model.backbone.config.moe=1"), "llama has no field moe")
    assert not (tmp_path / "run").exists()
