"""An exported folder is whole, says what it is, and computes what was trained, or it does not appear."""

import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

import ctrsink.serve  # makes the model type known
from ctrsink import storage
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.evaluate.prediction_file import FOLDER
from ctrsink.export import forms
from ctrsink.export.package import export_run, portable
from ctrsink.export.published import published
from ctrsink.families.decoder.merge import merged_weights
from ctrsink.families.registry import family_of, source_of
from ctrsink.prepare.tokenize import fingerprint, load_tokenizer
from ctrsink.train.checkpoint.checkpoint import find_checkpoint, save_checkpoint
from ctrsink.train.restore import restore_run
from ctrsink.train.tensors import Tensors
from tests.builders import layout_on
from tests.conftest import BUCKET
from tests.serving_fixtures import LLAMA, Prepared, prepared, run_spec, write_run


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
        weights, layers = merged_weights(run.model)
        assert layers == 2 * 7  # two layers of seven adapted maps
        unadapted = run.spec.model.model_copy(update={"lora": None})
        plain = family_of("decoder").build(unadapted, run.facts, 0).eval()
        plain.load_state_dict({name: make() for name, make in weights.items()})
        torch.testing.assert_close(plain(batch, run.objective).logits, adapted, atol=1e-5, rtol=0)
        assert torch.equal(run.model(batch, run.objective).logits, adapted)  # pyright: ignore[reportArgumentType]


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
    (tmp_path / "full" / "link").symlink_to(tmp_path / "nowhere")
    for name, kind in (("notes.txt", "file"), ("link", "link")):
        with pytest.raises(InputError, match=f"is a {kind}: choose"):
            export_run(spec.run_dir, str(tmp_path / "full" / name))
    with pytest.raises(InputError, match="an adapter is stored in fp32"):
        export_run(spec.run_dir, str(tmp_path / "above" / "out"), "bf16", form="adapter")
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


def test_what_others_put_on_s3_meanwhile_stays(s3_server: object, monkeypatch: pytest.MonkeyPatch) -> None:
    to = f"s3://{BUCKET}/export/shared"

    def put(notes: bool) -> None:
        with published(to) as folder:
            (folder / "config.json").write_text("{}")
            (folder / "weights").write_text("ours")
            if notes:
                storage.write_bytes(storage.join(to, "notes.txt"), b"mine")

    with pytest.raises(InputError, match="is not empty"):
        put(True)
    assert storage.list_files(to) == ["notes.txt"]
    storage.delete(to)
    upload_dir = storage.upload_dir

    def fail(source: Path, uri: str) -> None:
        upload_dir(source, uri)
        storage.write_bytes(storage.join(uri, "notes.txt"), b"mine")
        raise InputError("no more space")

    monkeypatch.setattr(storage, "upload_dir", fail)
    with pytest.raises(InputError, match="no more space"):
        put(False)
    assert storage.list_files(to) == ["notes.txt"]


def test_a_pretrained_base_that_was_trained_whole_is_exported(data: Prepared, tmp_path: Path) -> None:
    """Of the base nothing is left but its form: the run's weights are exported, and the base may go."""
    torch.manual_seed(5)
    fields = {key: value for key, value in LLAMA.items() if key != "model_type"}
    tokenizer = load_tokenizer(data.uri)
    AutoModel.from_config(AutoConfig.for_model("llama", **fields, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "base")
    pretrained = {"backbone": {"path": str(tmp_path / "base")}}
    spec = run_spec(data, str(tmp_path / "run"), ("sink", "bias", "head", "backbone"), pretrained)
    write_run(spec)
    run = restore_run(spec.run_dir)
    batch = source_of(run.dataset, "test", run.layout).build(torch.arange(4).numpy())
    with torch.no_grad():
        expected = run.model(batch, run.objective).logits
    done = export_run(spec.run_dir, str(tmp_path / "out"))
    assert (done["merged_layers"], done["form"]) == (0, "merged")
    assert done["difference"] <= 1e-5
    shutil.rmtree(tmp_path / "base")
    with torch.no_grad():
        torch.testing.assert_close(AutoModel.from_pretrained(tmp_path / "out")(batch), expected, atol=1e-5, rtol=0)
    files = [path for path in (tmp_path / "out").iterdir() if path.suffix in {".md", ".json"}]
    assert [path.name for path in files if str(tmp_path) in path.read_text()] == []


def test_what_computes_something_else_is_refused_and_leaves_nothing(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit of one weight that a disk, or a bug, has changed."""
    spec = run_spec(data, str(tmp_path / "run"))
    write_run(spec)
    write = forms.write_weights

    def changed(folder: Path, tensors: Tensors) -> None:
        write(folder, tensors)
        weights = load_file(folder / "model.safetensors")
        weights["ctr.backbone.layers.1.mlp.up_proj.weight"][:, 3] += 0.05
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(forms, "write_weights", changed)
    with pytest.raises(
        InputError, match=r"a logit x differs by \S+ of 1 \+ \|x\|, and 1e-05 is allowed in fp32; nothing was kept$"
    ):
        export_run(spec.run_dir, str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_model_that_bf16_changes_too_much_is_refused_in_it(data: Prepared, tmp_path: Path) -> None:
    spec = run_spec(data, str(tmp_path / "run"), ("sink", "bias", "head", "backbone"))
    write_run(spec)
    checkpoint = find_checkpoint(spec.run_dir)
    checkpoint.step = 6
    checkpoint.parameters = dict(checkpoint.parameters)
    for layer in range(2):  # attention so sharp that a rounded logit moves all of it
        checkpoint.parameters[f"backbone.layers.{layer}.self_attn.q_proj.weight"] *= 100
    save_checkpoint(spec.run_dir, checkpoint)
    with pytest.raises(InputError, match=r"0\.05 is allowed in bf16; nothing was kept; export it with --dtype fp32"):
        export_run(spec.run_dir, str(tmp_path / "out"), "bf16")
    assert not (tmp_path / "out").exists()
    assert export_run(spec.run_dir, str(tmp_path / "out"))["step"] == 6


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_large_model_is_written_in_shards(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Literal["fp32", "bf16"]
) -> None:
    spec = run_spec(data, str(tmp_path / "run"))
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "one"), dtype)
    monkeypatch.setattr("ctrsink.export.weights.SHARD_BYTES", 30_000)
    done = export_run(spec.run_dir, str(tmp_path / "several"), dtype)
    files = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_bytes())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    for name in files:
        for key, value in load_file(tmp_path / "several" / name).items():
            assert index["weight_map"][key] == name
            assert torch.equal(value, whole[key])
    assert sum(value.numel() for value in whole.values()) == done["parameters"]
    scorers = [ctrsink.serve.Scorer.load(str(tmp_path / name)) for name in ("one", "several")]
    request = ctrsink.serve.request_of(Dataset(data.uri), 0, 3, [0, 1, 2])
    assert scorers[0].score(request) == scorers[1].score(request)


def test_restored_weights_are_mapped_and_writing_to_them_leaves_the_checkpoint_as_it_is(data: Prepared, tmp_path: Path) -> None:
    spec = run_spec(data, str(tmp_path / "run"))
    write_run(spec)
    path = next((tmp_path / "run").rglob("parameters.safetensors"))
    before = path.read_bytes()
    run = restore_run(spec.run_dir)
    for name in run.checkpoint.parameters:
        run.model.get_parameter(name).data.zero_()
    assert path.read_bytes() == before
    assert str(path) in Path("/proc/self/maps").read_text()
