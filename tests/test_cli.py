"""The command line: exit codes, one line for what is wrong and nothing half-written, JSON on every verb, Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaModel

from ctrsink.config.data import TokenizerSpec
from ctrsink.prepare.tokenize import make_tokenizer
from tests.command_line import Result, call, call_process, content, good, refused
from tests.runs import prepared_data, run_tree

SHORT = ("stages.0.steps=2", "stages.1.steps=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(prepared_data(str(tmp_path_factory.mktemp("cli-data") / "set")))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of four steps; `config.yaml` beside it is what a user wrote for it."""
    folder = tmp_path_factory.mktemp("cli-run")
    (folder / "config.yaml").write_text(yaml.safe_dump(run_tree(str(data), str(folder / "run"))))
    good("train", "--config", folder / "config.yaml", *SHORT)
    return folder / "run"


@pytest.fixture(scope="module")
def model(run: Path) -> Path:
    """The exported model of that run."""
    good("export", "--run", run, "--to", run.parent / "model")
    return run.parent / "model"


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    """A configuration whose run is to be in `run` beside it."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_tree(str(data), str(tmp_path / "run"))))
    return tmp_path / "config.yaml"


def moved(run: Path, data: Path, to: Path) -> tuple[Path, Path]:
    """Copies of a run and of its data set that a test may damage: (run, data)."""
    shutil.copytree(data, to / "set")
    shutil.copytree(run, to / "run")
    path = to / "run" / "config.yaml"
    path.write_text(path.read_text().replace(str(data), str(to / "set")))
    return to / "run", to / "set"


REQUEST: dict[str, Any] = {
    "history": [{"item": {"title": "Oak", "genres": "Drama"}, "feedback": 4, "timestamp": 10}],
    "candidates": [{"title": "Oak", "genres": "Drama"}],
    "timestamp": 20,
}

# --- configuration ---


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["train.batch_sze=4"], ["config.yaml: unknown key train.batch_sze, did you mean batch_size? (allowed: batch_size, "]),
        (["trian.batch_size=4"], ["unknown key trian, did you mean train? (allowed: name, run_dir"]),
        (["train.zero_stage=4"], ["train.zero_stage: 4 is not allowed", "(allowed: 0, 1, 2 or 3)"]),
        (["data.examples=per_usr"], ["'per_usr' is not allowed, did you mean per_user? (allowed: 'per_target', 'per_request'"]),
        (["train.batch_size=many"], ["train.batch_size: ", "(got 'many')"]),
        (["train.batch_size"], ["override 'train.batch_size' is not of the form section.key=value"]),
        (["model.attention=eager"], ["the eager backend drops the inter-sink bias", "allowed: sdpa, blocks or flex"]),
        (["model.attention=flash_attention_2"], ["the flash_attention_2 backend drops the inter-sink bias", "or flex"]),
        (["runtime.kind=ray", "runtime.workers=9"], ["a batch of 8 sequences leaves some of 9 workers without work"]),
        (["model.backbone.config.hiden_size=8"], ["model.backbone.config: ", "no field hiden_size, did you mean hidden_size?"]),
        (["model.backbone.config=null", "model.backbone.path=no/such"], ["model.backbone.path no/such: "]),
        (["model.lora={targets: [q]}", "stages.1.trainable=[lora]", "stages.1.lr.lora=0.1"], ["model.lora.targets ['q']: "]),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_one_line_and_no_run(config: Path, overrides: list[str], parts: list[str]) -> None:
    refused(call("train", "--config", config, *overrides), *parts)
    assert not (config.parent / "run").exists()


def test_a_run_that_could_not_start_leaves_its_folder_to_the_corrected_one(config: Path) -> None:
    folder = config.parent / "run"
    folder.mkdir()
    (folder / "notes").write_text("mine")
    before = content(folder)
    refused(call("train", "--config", config, "model.backbone.config.hiden_size=8"), "hiden_size")
    assert content(folder) == before
    assert good("train", "--config", config, *SHORT, "evaluate.splits=[valid]")["finished"]
    assert (folder / "notes").read_text() == "mine"


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    for verb in (["train", "--config"], ["data", "prepare", "--config"], ["config", "show"]):
        refused(call(*verb, path), f"cannot read the configuration {path}: No such file")
    refused(call("submit", "--config", path, "--address", "http://127.0.0.1:9"), f"cannot read the configuration {path}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["fly"],
        ["data"],
        ["train"],
        ["train", "--config", "x", "--stop-after", "0"],
        ["train", "--config", "x", "--stop-after", "one"],
        ["data", "get", "netflix", "--to", "x"],
        ["data", "prepare", "--config", "x", "--on-bad-row", "guess"],
        ["evaluate", "--run", "x", "--split", "future"],
        ["export", "--run", "x"],
        ["score", "--model", "x"],
    ],
    ids=" ".join,
)
def test_arguments_that_are_none_end_with_2(args: list[str]) -> None:
    result = call(*args)
    assert result.code == 2
    assert result.err.startswith("usage: ctrsink")
    assert "error: " in result.err.splitlines()[-1]
    assert result.out == ""


# --- data set ---


def test_a_data_set_that_is_not_there(config: Path, tmp_path: Path) -> None:
    line = refused(call("train", "--config", config, f"data.uri={tmp_path / 'none'}"), "holds no manifest.json")
    assert line.startswith(f"error: {tmp_path / 'none'}")
    assert "`ctrsink data prepare`" in line
    assert not (tmp_path / "run").exists()


def flip(content: bytes) -> bytes:
    """Change a byte: of a manifest the first digit of a shard's hash, of another file one in its middle."""
    of_hash = content.find(b'"sha256": "') + len(b'"sha256": "')
    at = of_hash if content.startswith(b"{") else len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("file", ["shards/00001.parquet", "shards/00001.tokens.parquet", "index.parquet", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_file_is_found_by_every_verb_that_reads_it(
    config: Path, run: Path, data: Path, tmp_path: Path, file: str, damage: str
) -> None:
    (tmp_path / "old").mkdir()
    old, copied = moved(run, data, tmp_path / "old")
    whole = (copied / file).read_bytes()
    (copied / file).write_bytes(whole[:-9] if damage == "truncated" else flip(whole))
    # The manifest is the root: nothing vouches for it but its form, and that it is not what the run was trained on.
    manifest = file == "manifest.json"
    parts = [str(copied)] if manifest else [str(copied / file), damage, "prepare"]
    before = content(old)
    refused(call("evaluate", "--run", old), *parts)
    assert content(old) == before
    if manifest and damage == "altered":
        return
    refused(call("train", "--config", config, f"data.uri={copied}"), *parts)
    assert not (tmp_path / "run").exists()
    (copied / file).write_bytes(whole)
    assert good("train", "--config", config, f"data.uri={copied}", *SHORT, "evaluate.splits=[valid]")["steps"] == 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and a tokenizer of its own, as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = make_tokenizer(TokenizerSpec(train_vocabulary=310), ["quite other words than those of the titles"] * 3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_data_set_of_another_tokenizer_than_the_models(config: Path, llama: Path, data: Path) -> None:
    pretrained = ["model.backbone.config=null", f"model.backbone.path={llama}"]
    line = refused(
        call("train", "--config", config, *pretrained), f"{data} was prepared with another tokenizer than that of {llama}"
    )
    assert not (config.parent / "run").exists()
    # What the line advises works.
    advice = line.partition("prepare it again with ")[2].split()
    (config.parent / "log.csv").write_text(
        "user,item,timestamp,click\n" + "".join(f"u{i % 3},i{i % 4},{i},{i % 2}\n" for i in range(60))
    )
    tree = yaml.safe_load(config.read_text())
    tree["prepare"] = {
        "source": {"kind": "table", "path": str(config.parent / "log.csv"), "columns": {"label": "click"}},
        "text": {"item": "{item}"},
        "tokenizer": {"train_vocabulary": 300},
    }
    config.write_text(yaml.safe_dump(tree))
    again = f"data.uri={config.parent / 'again'}"
    assert good("data", "prepare", "--config", config, again, *advice)["events"] == 60
    assert good("train", "--config", config, again, *pretrained, *SHORT)["finished"]


def test_a_run_whose_data_set_was_replaced_is_not_measured_nor_exported(run: Path, data: Path, tmp_path: Path) -> None:
    old, copied = moved(run, data, tmp_path)
    shutil.rmtree(copied)
    prepared_data(str(copied), users=31)
    before = content(tmp_path)
    refused(call("evaluate", "--run", old), f"was trained on another data set than the one now in {copied}")
    refused(
        call("export", "--run", old, "--to", tmp_path / "model"), f"was trained on another data set than the one now in {copied}"
    )
    assert content(tmp_path) == before


# --- run folder ---


def test_a_folder_that_holds_a_run_is_not_taken(run: Path) -> None:
    config, before = run.parent / "config.yaml", content(run)
    for changes in ([], ["train.weight_decay=0.5"]):
        refused(call("train", "--config", config, *SHORT, *changes), f"{run} already holds a run: give --resume")
    other = call("train", "--config", config, *SHORT, "train.weight_decay=0.5", "--resume")
    refused(other, f"{run} belongs to another configuration: train.weight_decay was 0.01, is 0.5; choose another run_dir")
    assert content(run) == before


def test_what_is_no_run_is_not_measured_nor_exported(run: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        refused(call("evaluate", "--run", place), f"{place} holds no run: there is no config.yaml", "ctrsink train")
        refused(call("export", "--run", place, "--to", tmp_path / "model"), f"{place} holds no run")
    wanted = f"{run} has no checkpoint of step 999: choose one of those it has (2, 4)"
    before = content(run)
    refused(call("evaluate", "--run", run, "--checkpoint", 999), wanted)
    refused(call("export", "--run", run, "--to", tmp_path / "model", "--checkpoint", 999), wanted)
    refused(call("evaluate", "--run", run, "--checkpoint", "best"), "knows no best checkpoint")
    assert content(run) == before
    assert list(tmp_path.iterdir()) == []


def test_an_export_does_not_mix_with_what_is_there(run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes").write_text("mine")
    refused(call("export", "--run", run, "--to", tmp_path / "model"), f"{tmp_path / 'model'} is not empty: choose a new folder")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["notes"]


# --- scoring ---


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        ("{", ["line 2: not a JSON object"]),
        ("[]", ["line 2: "]),
        (json.dumps({k: v for k, v in REQUEST.items() if k != "candidates"}), ["line 2: missing key candidates"]),
        (json.dumps(REQUEST | {"candidates": [{"title": "Oak"}]}), ["line 2: candidates.0 has no field 'genres'"]),
        (json.dumps(REQUEST | {"timestamp": "now"}), ["line 2: timestamp: "]),
    ],
)
def test_a_bad_request_is_named_by_its_line(model: Path, tmp_path: Path, bad: str, parts: list[str]) -> None:
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(REQUEST)}\n{bad}\n")
    score = ["score", "--model", model, "--input", tmp_path / "in.jsonl"]
    refused(call(*score, "--output", tmp_path / "out.jsonl"), f"{tmp_path / 'in.jsonl'}, ", *parts)
    assert not (tmp_path / "out.jsonl").exists()
    assert call(*score).out == ""


def test_a_model_that_is_not_there(run: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(REQUEST))
    for place in (tmp_path / "none", run):
        refused(call("score", "--model", place, "--input", tmp_path / "in.jsonl"), f"{place} holds no model", "`ctrsink export`")
    refused(call("score", "--model", model, "--input", tmp_path / "none"), f"{tmp_path / 'none'} does not exist")


def test_scoring_is_a_process_without_the_engines_of_training(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(REQUEST) + "\n")
    program = (
        "import sys; from ctrsink.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({'ray', 'deepspeed', 'tensorboard'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    score = ["score", "--model", str(model), "--input", str(tmp_path / "in.jsonl"), "--json"]
    done = subprocess.run([sys.executable, "-c", program, *score], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "[]")
    here = call(*score)
    assert done.stdout == here.out
    assert here.json == {"requests": 1, "candidates": 1}


# --- what every verb has in common ---


def test_json_is_the_last_line_of_every_verb(run: Path, model: Path, config: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(REQUEST))
    for name in ("ratings.dat", "movies.dat", "README"):
        (tmp_path / "ml").mkdir(exist_ok=True)
        (tmp_path / "ml" / name).touch()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "lm").mkdir(exist_ok=True)
        (tmp_path / "lm" / name).touch()
    # The others (data prepare, train, export) are checked by whoever calls `good`, submit on a cluster.
    assert good("data", "get", "movielens-1m", "--to", tmp_path / "ml") == {"data": str(tmp_path / "ml")}
    assert good("model", "get", "smollm2-135m", "--to", tmp_path / "lm") == {"model": str(tmp_path / "lm")}
    shown = good("config", "show", config, "train.batch_size=16")
    assert shown["train"]["batch_size"] == 16
    assert yaml.safe_load(call("config", "show", config, "train.batch_size=16").out) == shown
    assert good("evaluate", "--run", run, "--split", "test", "--checkpoint", 2)["evaluation"]["test"]["impressions"] > 0
    good("evaluate", "--run", run)
    for command in (
        ["data", "prepare", "--config", config],
        ["train", "--config", config, "x=1"],
        ["evaluate", "--run", tmp_path],
        ["export", "--run", tmp_path, "--to", tmp_path / "out"],
        ["score", "--model", tmp_path, "--input", tmp_path / "in.jsonl"],
        ["config", "show", tmp_path / "none"],
        ["data", "get", "movielens-1m", "--to", tmp_path],
        ["model", "get", "smollm2-135m", "--to", tmp_path],
        ["submit", "--config", config, "--address", "http://127.0.0.1:9", "--working-dir", tmp_path / "ml"],
    ):
        result = call(*command, "--json")
        line = refused(result)
        assert result.json == {"error": line.removeprefix("error: "), "exit_code": 2}
        assert len(result.out.splitlines()) == 1


def test_a_real_process_keeps_stdout_for_the_result(config: Path) -> None:
    trained = call_process("train", "--config", config, *SHORT, "--json")
    assert trained.code == 0
    assert trained.json["evaluation"]["valid"]["impressions"] > 0
    assert "step 4/4 stage all loss" in trained.err
    assert "step 4/4" not in trained.out
    refused(call_process("config", "show", config, "train.batch_sze=4"), "unknown key train.batch_sze")


def test_ctrl_c_ends_with_130_and_the_run_goes_on_later(config: Path) -> None:
    train = ["train", "--config", str(config), "stages.1.steps=2000", "train.checkpoint_every=3", "evaluate.splits=[valid]"]
    command = [sys.executable, "-m", "ctrsink", *train, "--json"]
    # Whoever starts the tests in the background leaves SIGINT ignored, and a child would inherit that.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stderr is not None
        seen: list[str] = []
        while not any("checkpoint" in line and "step-00000009" in line for line in seen):
            seen.append(process.stderr.readline())
            assert seen[-1], "".join(seen)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    result = Result(process.returncode, out, "".join(seen) + err)
    assert result.code == 130
    assert "Traceback" not in result.out + result.err
    assert [line for line in result.err.splitlines() if "error" in line] == ["error: interrupted"]
    assert result.err.splitlines()[-1] == "error: interrupted"
    assert result.json == {"error": "interrupted", "exit_code": 130}
    resumed = call(*train, "--resume", "--stop-after", 2, "--json")
    assert resumed.code == 0
    assert resumed.json["steps"] >= 9 + 2
    assert f"continuing from the checkpoint of step {resumed.json['steps'] - 2}" in resumed.err
