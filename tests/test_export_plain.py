"""A model without sinks is a decoder of transformers' own: alone, it gives the logits that training and `ctrsink score` give."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, LlamaForSequenceClassification

from ctrsink.config import RunSpec, parse_run
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.export.forms import plain
from ctrsink.export.package import export_run
from ctrsink.families.decoder.plain import prompts
from ctrsink.families.registry import source_of
from ctrsink.serve import Scorer, request_of
from ctrsink.train.restore import restore_run
from tests.serving_fixtures import Prepared, prepared, run_spec, write_run

PLAIN = {"sinks": None, "bias": None, "head": "linear"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("plain"))


def ran(data: Prepared, folder: Path, trainable: tuple[str, ...] = ("head", "lora"), **sequences: object) -> RunSpec:
    spec = run_spec(data, str(folder / "run"), trainable, PLAIN, **sequences)
    write_run(spec)
    return spec


@pytest.mark.parametrize(("examples", "history"), [("per_target", 4), ("per_target", 0), ("per_user", 2)])
def test_transformers_alone_gives_the_same_logits(data: Prepared, tmp_path: Path, examples: str, history: int) -> None:
    """In a process that never imports this library, by the code of the model card."""
    spec = ran(data, tmp_path, examples=examples, history=history)
    done = export_run(spec.run_dir, str(tmp_path / "out"), form="plain")
    assert done["difference"] <= 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForSequenceClassification"])
    card = (tmp_path / "out" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code[: code.index("click_probability([")].replace("path/to/this/folder", str(tmp_path / "out"))
    dataset = Dataset(data.uri)
    requests = [request_of(dataset, user, 5, [0, 1]) for user in range(3)]
    asked = "\nimport json, sys\nfor request in json.load(sys.stdin):\n    for candidate in request['candidates']:\n"
    asked += "        print(click_probability(request['history'], candidate))\nassert 'ctrsink' not in sys.modules\n"
    process = subprocess.run(
        [sys.executable, "-c", code + asked],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
    )
    assert process.returncode == 0, process.stderr
    scorer = Scorer.load(str(tmp_path / "out"))
    expected = [probability for request in requests for probability in scorer.score(request)]
    assert [float(line) for line in process.stdout.split()] == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.01


@pytest.mark.parametrize("examples", ["per_target", "per_user"])
@pytest.mark.parametrize("trainable", [("head", "lora"), ("head", "backbone")])
def test_logits_of_training_are_those_of_its_prompts(
    data: Prepared, tmp_path: Path, examples: str, trainable: tuple[str, ...]
) -> None:
    spec = ran(data, tmp_path, trainable, examples=examples)
    export_run(spec.run_dir, str(tmp_path / "out"), form="plain")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert type(model) is LlamaForSequenceClassification
    run = restore_run(spec.run_dir)
    batch = source_of(run.dataset, "test", run.layout).build(torch.arange(4).numpy())
    with torch.no_grad():
        found = torch.cat([model(input_ids=ids[None]).logits[0] for ids in prompts(batch)])
        torch.testing.assert_close(found, run.model(batch, run.objective).logits, atol=1e-5, rtol=0)


def test_prompts_of_targets_that_share_a_history_hold_their_own_text_alone(data: Prepared, tmp_path: Path) -> None:
    spec = ran(data, tmp_path)
    export_run(spec.run_dir, str(tmp_path / "out"), form="plain")
    scorer = Scorer.load(str(tmp_path / "out"))
    request = request_of(Dataset(data.uri), 1, 5, [0, 1, 2])
    together = scorer.score(request)
    alone = [scorer.score(request | {"candidates": [candidate]})[0] for candidate in request["candidates"]]
    assert together == pytest.approx(alone, abs=1e-6)


def test_a_model_with_more_than_transformers_has_is_refused(data: Prepared, tmp_path: Path) -> None:
    cases = {
        "sinks": ({}, "it has sinks"),
        "norm": (PLAIN | {"head": "norm"}, r"a layer norm in its head \(model.head: norm\), which cannot be folded"),
        "window": (PLAIN | {"window": 2}, r"a window \(model.window\)"),
        "told": (PLAIN | {"target": {"signals": ["item_mean"]}, "head": "norm"}, "told targets .* and a layer norm"),
    }
    for name, (model, reason) in cases.items():
        groups = ("sink", "bias", "head", "lora") if name == "sinks" else ("head", "lora")
        spec = run_spec(data, str(tmp_path / name), groups, model)
        write_run(spec)
        with pytest.raises(InputError, match=rf"is no plain decoder, for it has .*{reason.removeprefix('it has ')}"):
            export_run(spec.run_dir, str(tmp_path / "out"), form="plain")
    pooled = run_spec(data, str(tmp_path / "pooled"), ("head", "lora"), PLAIN, {"over": "all", "form": "pool"})
    write_run(pooled)
    with pytest.raises(InputError, match="a readout by the mean of states"):
        export_run(pooled.run_dir, str(tmp_path / "out"), form="plain")
    assert not (tmp_path / "out").exists()


def test_numbers_of_a_target_need_the_head_with_a_norm(data: Prepared, tmp_path: Path) -> None:
    tree = run_spec(data, str(tmp_path / "run"), ("head", "lora"), PLAIN).model_dump(mode="json")
    tree["model"]["target"] = {"signals": ["item_mean"]}
    with pytest.raises(InputError, match="numbers of a target have a head of their own: set head to norm"):
        parse_run(tree, "test")


def test_bf16_is_a_plain_decoder_too(data: Prepared, tmp_path: Path) -> None:
    spec = ran(data, tmp_path)
    done = export_run(spec.run_dir, str(tmp_path / "out"), "bf16", form="plain")
    assert 0 < done["difference"] < 0.05
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert len(Scorer.load(str(tmp_path / "out")).score(request_of(Dataset(data.uri), 1, 5, [0, 1]))) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"item": "{title}<eos>{year}"}, "text.item has control tokens"),
        ({"item": "{title}<pad>"}, "text.item ends in the padding token <pad>"),
        ({"feedback": " {feedback}", "separator": "<pad>"}, "text.separator ends in the padding token <pad>"),
    ],
)
def test_a_template_that_the_card_cannot_ask_by_is_refused(data: Prepared, tmp_path: Path, text: Any, message: str) -> None:
    spec = ran(data, tmp_path)
    run = restore_run(spec.run_dir)
    manifest = run.dataset.manifest
    run.dataset.manifest = manifest.model_copy(update={"text": manifest.text.model_copy(update=text)})
    with pytest.raises(InputError, match=message):
        plain(run, tmp_path, "fp32")


def test_retrieved_behaviours_are_refused(data: Prepared, tmp_path: Path) -> None:
    run = restore_run(ran(data, tmp_path).run_dir)
    run = replace(run, layout=replace(run.layout, retrieve=2))
    with pytest.raises(InputError, match=r"not those that data.retrieve finds"):
        plain(run, tmp_path, "fp32")
