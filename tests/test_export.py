"""An exported folder is whole, says what it is, loads through transformers' auto classes, and only with our classes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import ctrsink.serve  # makes the model type known
from ctrsink import storage
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.evaluate.prediction_file import FOLDER
from ctrsink.export.package import export_run, portable
from ctrsink.families.decoder.merge import merge_lora
from ctrsink.families.registry import source_of
from ctrsink.prepare.tokenize import fingerprint
from ctrsink.train.restore import restore_run
from tests.builders import layout_on
from tests.conftest import BUCKET
from tests.serving_fixtures import Prepared, prepared, run_spec, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("export"))


def test_merged_lora_computes_the_same_with_plain_layers(data: Prepared, tmp_path: Path) -> None:
    spec = run_spec(data, str(tmp_path / "run"))
    write_run(spec)
    run = restore_run(spec.run_dir)
    batch = source_of(run.dataset, "test", run.layout).build(torch.arange(3).numpy())
    with torch.no_grad():
        adapted = run.model(batch, run.objective).logits
        for name, parameter in run.model.named_parameters():
            if "lora_B" in name:
                assert parameter.abs().sum() > 0
        merged = merge_lora(run.model)
        plain = run.model(batch, run.objective).logits
    assert merged == 2 * 7  # two layers of seven adapted maps
    assert not [name for name, _ in run.model.named_parameters() if "lora" in name or "base_layer" in name]
    torch.testing.assert_close(plain, adapted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_auto_model_computes_what_the_run_computes(data: Prepared, tmp_path: Path, dtype: str) -> None:
    spec = run_spec(data, str(tmp_path / "run"))
    write_run(spec)
    result = export_run(spec.run_dir, str(tmp_path / "out"), dtype)  # pyright: ignore[reportArgumentType]
    assert (result["step"], result["dtype"], result["merged_layers"]) == (5, dtype, 14)
    run = restore_run(spec.run_dir)
    batch = source_of(run.dataset, "test", run.layout).build(torch.arange(4).numpy())
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        probabilities, expected = model(batch).sigmoid(), run.model(batch, run.objective).logits.sigmoid()
    torch.testing.assert_close(probabilities, expected, atol=1e-5 if dtype == "fp32" else 0.02, rtol=0)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    kept = {name: value.dtype for name, value in weights.items() if not name.startswith("ctr.backbone.")}
    assert set(kept.values()) == {torch.float32}
    stored = {value.dtype for name, value in weights.items() if name.startswith("ctr.backbone.")}
    assert stored == {torch.float32 if dtype == "fp32" else torch.bfloat16}
    assert sum(value.numel() for value in weights.values()) == result["parameters"]


def test_the_exported_tokenizer_has_names_that_transformers_4_knows_and_gives_the_same_tokens(
    data: Prepared, tmp_path: Path
) -> None:
    """`TokenizersBackend` exists in 5 alone, and 4 takes `extra_special_tokens` for a mapping."""
    spec = run_spec(data, str(tmp_path / "run"))
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    fields = json.loads((tmp_path / "out" / "tokenizer_config.json").read_bytes())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(fields.get("extra_special_tokens"), list)
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path / "out")) == Dataset(data.uri).manifest.tokenizer_fingerprint
    listed = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|x|>"], "pad_token": "<pad>"}
    found = json.loads(portable("tokenizer_config.json", json.dumps(listed).encode()))
    assert found == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|x|>"],
        "pad_token": "<pad>",
    }


def test_plain_transformers_refuses_the_folder(data: Prepared, tmp_path: Path) -> None:
    spec = run_spec(data, str(tmp_path / "run"))
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    program = f"from transformers import AutoModel; AutoModel.from_pretrained({str(tmp_path / 'out')!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode != 0
    assert "model type `ctrsink`" in done.stderr


def test_full_training_and_models_without_sinks_are_exported_too(data: Prepared, tmp_path: Path) -> None:
    for name, model in (("sinks", {}), ("plain", {"sinks": None, "bias": None})):
        trainable = ("head", "backbone")
        spec = run_spec(data, str(tmp_path / name), trainable, model)
        write_run(spec)
        result = export_run(spec.run_dir, str(tmp_path / f"{name}-out"))
        assert result["merged_layers"] == 0
        run = restore_run(spec.run_dir)
        batch = source_of(run.dataset, "valid", run.layout).build(torch.arange(2).numpy())
        with torch.no_grad():
            expected = run.model(batch, run.objective).logits
            found = AutoModel.from_pretrained(tmp_path / f"{name}-out").eval()(batch)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_card_tells_data_budget_and_metrics_and_no_path(data: Prepared, tmp_path: Path) -> None:
    spec = run_spec(data, str(tmp_path / "run"))
    write_run(spec)
    metrics = {
        "step": 5,
        "impressions": 6,
        "auc": 0.61237,
        "gauc": 0.5,
        "uauc": 0.55,
        "users": 3,
        "uauc_two": None,
        "users_two": 0,
        "logloss": 0.69,
        "normalised_entropy": 1.01,
        "calibration_error": 0.1,
    }
    storage.write_bytes(storage.join(spec.run_dir, FOLDER, "test.json"), json.dumps(metrics).encode())
    export_run(spec.run_dir, str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    dataset = Dataset(data.uri)
    counts = dataset.manifest.splits["train"]
    assert f"| train | {counts.impressions} | {counts.positives} |" in card
    assert "at least 4" in card
    assert "5 optimiser steps of 4 sequences: 20 sequences with 20 impressions" in card
    assert "Seed 3" in card
    assert "| only | all (attend) | 5 steps |" in card
    assert "| test | 6 | 0.6124 | 0.5000 | 0.5500 | - | 0.6900 | 1.0100 | 0.1000 |" in card
    assert "**On test the model is not better than always predicting the mean click rate (normalised entropy 1.0100" in card
    assert "over the 3 users with both classes, UAUC (2) over the 0 with" in card
    files = [path for path in (tmp_path / "out").iterdir() if path.suffix in {".md", ".json"}]
    assert {"README.md", "config.json", "tokenizer.json"} <= {path.name for path in files}
    assert [path.name for path in files if str(tmp_path) in path.read_text()] == []


def test_a_chosen_checkpoint_is_exported_without_the_metrics_of_another(data: Prepared, tmp_path: Path) -> None:
    spec = run_spec(data, str(tmp_path / "run"))
    write_run(spec, step=2)
    write_run(spec, step=5)
    metrics = dict.fromkeys(("impressions", "auc", "gauc", "logloss", "normalised_entropy", "calibration_error"), 1)
    storage.write_bytes(storage.join(spec.run_dir, FOLDER, "test.json"), json.dumps({"step": 5, **metrics}).encode())
    assert export_run(spec.run_dir, str(tmp_path / "new"))["step"] == 5
    assert "| test | 1 |" in (tmp_path / "new" / "README.md").read_text()
    assert export_run(spec.run_dir, str(tmp_path / "old"), checkpoint=2)["step"] == 2
    assert "this checkpoint was not measured" in (tmp_path / "old" / "README.md").read_text()
    new, old = (load_file(tmp_path / name / "model.safetensors") for name in ("new", "old"))
    assert not torch.equal(new["ctr.head.linear.weight"], old["ctr.head.linear.weight"])
    with pytest.raises(InputError, match=r"no checkpoint of step 3: choose one of those it has"):
        export_run(spec.run_dir, str(tmp_path / "none"), checkpoint=3)
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_exported_is_said_and_leaves_nothing(data: Prepared, tmp_path: Path) -> None:
    spec = run_spec(data, str(tmp_path / "run"))
    with pytest.raises(InputError, match="holds no run"):
        export_run(spec.run_dir, str(tmp_path / "out"))
    write_run(spec)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        export_run(spec.run_dir, str(tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    tokenizer = next(iter(Path(data.uri, "tokenizer").iterdir()))
    content = tokenizer.read_bytes()
    tokenizer.write_bytes(content + b" ")
    try:
        with pytest.raises(InputError, match="does not match the sha256"):
            export_run(spec.run_dir, str(tmp_path / "out"))
    finally:
        tokenizer.write_bytes(content)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run"]


def test_run_and_export_on_s3(data: Prepared, tmp_path: Path, s3_server: object) -> None:
    spec = run_spec(data, f"s3://{BUCKET}/export/run")
    write_run(spec)
    to = f"s3://{BUCKET}/export/model"
    export_run(spec.run_dir, to)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(storage.list_files(to))
    with pytest.raises(InputError, match="is not empty"):
        export_run(spec.run_dir, to)
    scorer = ctrsink.serve.Scorer.load(to)
    dataset = Dataset(data.uri)
    assert layout_on(spec.data, spec.model, dataset.manifest) == scorer.layout
    assert len(scorer.score(ctrsink.serve.request_of(dataset, 0, 3, [0, 1, 2]))) == 3
