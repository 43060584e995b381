"""Every family without text, by configuration alone: trained through two stages, resumed, evaluated, exported and scored."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel

from ctrsink.config import parse_run
from ctrsink.config.load import merge
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.export.package import export_run
from ctrsink.families.registry import FAMILIES, source_of
from ctrsink.report.look import look
from ctrsink.runtime.start import start
from ctrsink.serve import Scorer, request_of
from ctrsink.train.measure import evaluate_run
from ctrsink.train.restore import restore_run
from tests.runs import prepared_data
from tests.test_config_families import SECTIONS

SIGNALS: dict[str, Any] = {
    "behaviours": ["item_id", "feedback", "previous_gap", "deviation"],
    "target": ["item_id", "hour", "item_mean", "user_res"],
    "rows": 60,
}
SMALL: dict[str, dict[str, Any]] = {
    "din": {"width": 8, "attention_layers": [4], "layers": [4]},
    "hstu": {"width": 8, "layers": [4]},
    "sparse": {"width": 8, "heads": 2, "chunks": 3, "window": 4, "layers": [4]},
    "srp": {"width": 8, "heads": 2, "inner": 16, "queries": 2, "tower": [4]},
}
FORMS = [
    (name, form) for name in SMALL for form in ("per_target", "per_request", "per_user") if (name, form) != ("srp", "per_user")
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("families") / "data"))


def tree_of(name: str, data: str, run_dir: str, examples: str, **changes: Any) -> dict[str, Any]:
    """A run of 4 steps of a family, in two stages; the first of srp foretells hidden fields."""
    every = SECTIONS[name].GROUPS
    groups = [group for group in every if group != "cloze"]
    first = {"objective": "cloze", "trainable": ["ids", "embedding", "encoder", "cloze"]} if name == "srp" else {}
    stage = {"trainable": groups, "lr": dict.fromkeys(every, 0.01), "steps": 2}
    tree: dict[str, Any] = {
        "run_dir": run_dir,
        "data": {"uri": data, "examples": examples, "history": 6, "targets": 1 if examples == "per_target" else 4},
        "model": {"family": name, **SIGNALS, **SMALL[name]},
        "stages": [{"name": "first", **stage, **first}, {"name": "all", **stage}],
        "train": {"batch_size": 8, "micro_batch_tokens": 200, "checkpoint_every": 100, "log_every": 1, "zero_stage": 0},
        "evaluate": {"splits": ["valid", "test"]},
        "runtime": {"kind": "local", "workers": 1},
    }
    return merge(tree, changes)


def test_no_family_is_left_out() -> None:
    assert {*SMALL, "decoder"} == set(FAMILIES)


@pytest.mark.parametrize(("name", "examples"), FORMS)
def test_a_trained_model_scores_what_evaluation_measured(name: str, examples: str, data: str, tmp_path: Path) -> None:
    spec = parse_run(tree_of(name, data, str(tmp_path / "run"), examples), "test")
    assert not start(spec, stop_after=1)["finished"]
    result = start(spec, resume=True)
    assert (result["finished"], result["steps"]) == (True, 4)
    measured = pq.read_table(tmp_path / "run/evaluation/test.parquet").to_pydict()
    assert evaluate_run(spec.run_dir, ("test",))["test"]["auc"] == pytest.approx(result["evaluation"]["test"]["auc"])
    exported = export_run(spec.run_dir, str(tmp_path / "model"))
    scorer = Scorer.load(exported["model"])
    dataset = Dataset(data)
    index = {
        str(u): row for row in range(len(dataset.index["row"])) for u in [dataset.locate(row)[0].users[dataset.locate(row)[1]]]
    }
    wrong = []
    for user, event, expected in list(zip(measured["user"], measured["event"], measured["probability"], strict=True))[:12]:
        request = request_of(dataset, index[user], event)
        (found,) = scorer.score(request)
        # Of an item its id is enough, and what the signals need: there is no text to read.
        for item in (*(behaviour["item"] for behaviour in request["history"]), *request["candidates"]):
            del item["title"], item["genres"]
        assert scorer.score(request) == [found]
        wrong.append(abs(found - expected))
    # A piece of a chronology shows its later targets more history than `history`; a request has just that.
    assert max(wrong) < (1e-5 if examples != "per_user" else 0.05)
    run = restore_run(spec.run_dir)
    batch = source_of(run.dataset, "test", run.layout).build(np.arange(4))
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(batch), run.model(batch, run.objective).logits)
    assert f'"ctrsink-{name} (import ctrsink first)"' in (tmp_path / "model/config.json").read_text()


def test_pretraining_is_measured_by_what_it_foretells(data: str, tmp_path: Path) -> None:
    validation = {"train": {"validation": {"every": 1, "sequences": 20}}}
    spec = parse_run(tree_of("srp", data, str(tmp_path / "run"), "per_target", **validation), "test")
    start(spec)
    rows = [line for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"stage": "first"' in line]
    assert rows
    assert all("valid/accuracy/item_id" in row and "valid/auc" not in row for row in rows)


def test_a_checkpoint_that_foretells_no_clicks_is_refused_as_a_model(data: str, tmp_path: Path) -> None:
    train = {"checkpoint_every": 1, "keep": {"last": 4}}
    spec = parse_run(tree_of("srp", data, str(tmp_path / "run"), "per_target", train=train), "test")
    assert not start(spec, stop_after=1)["finished"]
    run_dir, to = spec.run_dir, str(tmp_path / "model")
    refused = f"the checkpoint of step 1 of {re.escape(run_dir)} is of the stage first, which foretells no clicks: .*--checkpoint"
    uses = (lambda: export_run(run_dir, to), lambda: evaluate_run(run_dir, ("test",)), lambda: look(run_dir))
    for use in uses:
        with pytest.raises(InputError, match=refused):
            use()
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "run/evaluation").exists()
    start(spec, resume=True)
    with pytest.raises(InputError, match=refused):
        export_run(run_dir, to, checkpoint=1)
    with pytest.raises(InputError, match=refused):
        evaluate_run(run_dir, ("test",), 1)
    assert export_run(run_dir, to, checkpoint=4)["step"] == 4
