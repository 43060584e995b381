"""An adapter is PEFT's own, scores what the merged model scores, and refuses a base with other weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ctrsink.cli import main
from ctrsink.config import RunSpec
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.export.package import export_run
from ctrsink.families.registry import source_of
from ctrsink.prepare.tokenize import load_tokenizer
from ctrsink.serve import Scorer, request_of
from ctrsink.train.restore import restore_run
from tests.serving_fixtures import LLAMA, Prepared, prepared, run_spec, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def base(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model in a folder."""
    folder = tmp_path_factory.mktemp("base") / "small-llama"
    torch.manual_seed(7)
    tokenizer = load_tokenizer(data.uri)
    fields = {key: value for key, value in LLAMA.items() if key != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ran(data: Prepared, base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    spec = run_spec(data, str(tmp_path_factory.mktemp("runs") / "run"), model={"backbone": {"path": str(base)}})
    write_run(spec)
    return spec


def test_both_forms_score_the_same_and_the_adapter_is_small(ran: RunSpec, tmp_path: Path) -> None:
    merged = export_run(ran.run_dir, str(tmp_path / "merged"))
    adapter = export_run(ran.run_dir, str(tmp_path / "adapter"), form="adapter")
    assert adapter["difference"] <= 1e-5
    assert adapter["parameters"] < merged["parameters"]
    one, other = (Scorer.load(str(tmp_path / form)) for form in ("merged", "adapter"))
    with pytest.raises(InputError, match="holds all its weights, and is no adapter: leave out --base"):
        Scorer.load(str(tmp_path / "merged"), base=str(tmp_path))
    dataset = Dataset(ran.data.uri)
    for user in range(4):
        request = request_of(dataset, user, 5, [0, 1, 2])
        assert other.score(request) == pytest.approx(one.score(request), abs=1e-5)
        assert max(one.score(request)) - min(one.score(request)) > 1e-3


def test_plain_peft_loads_the_adapter(ran: RunSpec, base: Path, tmp_path: Path) -> None:
    """As a user without this library does; the backbone is all that PEFT knows of."""
    export_run(ran.run_dir, str(tmp_path / "out"), form="adapter")
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "out").eval()
    trained = restore_run(ran.run_dir).model
    names = [name for name, _ in trained.named_parameters() if ".lora_" in name]
    found = {name.removeprefix("base_model.model."): value for name, value in adapted.named_parameters()}
    assert len(names) == 2 * 2 * 7
    for name in names:
        assert torch.equal(found[name.removeprefix("backbone.")], trained.get_parameter(name))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        states = adapted(input_ids=ids).last_hidden_state
        assert (states - AutoModel.from_pretrained(base)(input_ids=ids).last_hidden_state).abs().max() > 0.01


def test_auto_model_loads_an_adapter_with_its_base(ran: RunSpec, tmp_path: Path) -> None:
    export_run(ran.run_dir, str(tmp_path / "out"), form="adapter")
    run = restore_run(ran.run_dir)
    batch = source_of(run.dataset, "test", run.layout).build(torch.arange(4).numpy())
    with torch.no_grad():
        found = AutoModel.from_pretrained(tmp_path / "out")(batch)
        torch.testing.assert_close(found, run.model(batch, run.objective).logits, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="has no option dtype"):
        AutoModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)


def test_a_base_elsewhere_is_named_and_another_one_is_refused(ran: RunSpec, base: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert main(["export", "--run", ran.run_dir, "--to", out, "--form", "adapter"]) == 0
    moved = base.with_name("moved")
    base.rename(moved)
    try:
        with pytest.raises(InputError, match=r"base .*small-llama is neither a folder nor in the Hugging Face cache: .* --base"):
            Scorer.load(out)
        request = request_of(Dataset(ran.data.uri), 0, 5, [0, 1])
        (tmp_path / "in.jsonl").write_text(json.dumps(request))
        files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "scores.jsonl")]
        assert main(["score", "--model", out, "--base", str(moved), *files]) == 0
        assert len(json.loads((tmp_path / "scores.jsonl").read_bytes())["probabilities"]) == 2
        other = tmp_path / "other"
        shutil.copytree(moved, other)
        weights = load_file(other / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][3, 4] += 1e-6
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=rf"^{other} has other weights than the base that the adapter .* --base$"):
            Scorer.load(out, base=str(other))
    finally:
        moved.rename(base)


def test_damaged_adapters_are_refused(ran: RunSpec, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_run(ran.run_dir, str(out), form="adapter")
    weights = load_file(out / "ctrsink.safetensors")
    weights.pop("head.linear.bias")
    save_file(weights, out / "ctrsink.safetensors")
    with pytest.raises(InputError, match=r"ctrsink.safetensors does not fit its configuration: export the model again"):
        Scorer.load(str(out))
    (out / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model.safetensors is missing or damaged"):
        Scorer.load(str(out))


def test_a_run_without_an_adapter_says_so_and_leaves_nothing(data: Prepared, base: Path, tmp_path: Path) -> None:
    pretrained = {"backbone": {"path": str(base)}}
    cases = {
        "random": (run_spec(data, str(tmp_path / "random")), "began with random weights, which lie nowhere"),
        "whole": (
            run_spec(data, str(tmp_path / "whole"), ("head", "backbone"), pretrained),
            "no LoRA .* leave out --form adapter",
        ),
        "norm": (
            run_spec(data, str(tmp_path / "norm"), ("head", "lora", "norm"), pretrained),
            r"trained weights of its base itself \(backbone.layers.0.input_layernorm.weight\)",
        ),
    }
    for spec, reason in cases.values():
        write_run(spec)
        with pytest.raises(InputError, match=reason):
            export_run(spec.run_dir, str(tmp_path / "out"), form="adapter")
    with pytest.raises(InputError, match="an adapter is stored in fp32"):
        export_run(cases["norm"][0].run_dir, str(tmp_path / "out"), "bf16", form="adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(cases)
