"""`model.sparse` by configuration: what goes with it, a run of it, and an exported model that computes the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from ctrsink.config import parse_run
from ctrsink.config.load import merge
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.export.package import export_run
from ctrsink.families.registry import family_of, source_of
from ctrsink.runtime.start import start
from ctrsink.serve import Scorer, request_of
from ctrsink.train.restore import restore_run
from tests.builders import run_tree
from tests.chunked_fixtures import FORMS
from tests.runs import prepared_data
from tests.runs import run_tree as small_run
from tests.serving_fixtures import Prepared, prepared, run_spec, write_run
from tests.told_fixtures import evaluated

SPARSE = {"chunks": 2, "transition": 1, "window": 2, "summary_bias": True}
SINKS = {"signals": ["previous_gap", "feedback"], "buckets": 20, "embedding_size": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("bridge"), users=7, per_user=14)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "bias is a table of all pairs of sinks, as large as what sparse saves: set bias to null with sparse"),
        ({"bias": None, "sinks": None}, "sparse reads a history through its sinks: set it to null where sinks is null"),
        ({"bias": None, "window": 9}, "window and sparse are two rules for one attention: set window to null"),
        (
            {"bias": None, "sparse": {"transition": 9, "window": 8}},
            "transition 9 is more than window 8, whose sinks are all read",
        ),
        ({"bias": None, "sparse": {"chunks": 0}}, "model.sparse.chunks: Input should be greater than or equal to 1"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(model: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_run(merge(run_tree(), {"model": {"sparse": {}} | model}), "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [{"sparse": {}, "bias": None}, {}], ids=["by chunks", "all"])
def test_blocks_are_for_cpus(model: dict[str, Any]) -> None:
    tree = merge(run_tree(runtime={"device": "cuda"}), {"model": model | {"attention": "blocks"}})
    run = parse_run(tree, "x")  # as one that was made so before is read
    with pytest.raises(
        InputError, match=r"model\.attention: blocks is for CPUs, and would ask a GPU about every block; use flex"
    ):
        family_of("decoder").check(run, None, int)  # pyright: ignore[reportArgumentType]
    for attention in ("sdpa", "flex"):
        assert parse_run(merge(tree, {"model": {"attention": attention}}), "x").model.attention == attention


def test_what_goes_together() -> None:
    for more in ({}, {"temporal": True}, {"similarity": "neighbours"}, {"attention": "blocks"}):
        model = parse_run(merge(run_tree(), {"model": {"sparse": {}, "bias": None} | more}), "x").model
        assert (model.sparse.chunks, model.sparse.transition, model.sparse.window) == (16, 2, 64)
        assert ("bias" in model.absent) == (more in ({}, {"attention": "blocks"}))
    assert "bias" not in parse_run(merge(run_tree(), {"model": {"sparse": SPARSE, "bias": None}}), "x").model.absent


@pytest.mark.parametrize("examples", FORMS)
def test_an_exported_model_scores_as_it_was_evaluated(data: Prepared, tmp_path: Path, examples: str) -> None:
    model = {"sparse": SPARSE, "bias": None, "temporal": True, "sinks": SINKS, "attention": "blocks"}
    sequences = {"examples": examples, "text_history": 0, "history": 2 if examples == "per_user" else 6, "targets": 3}
    spec = run_spec(data, str(tmp_path / "run"), model=model, **sequences)
    write_run(spec)
    export_run(spec.run_dir, str(tmp_path / "out"))
    run = restore_run(spec.run_dir)
    assert (run.layout.chunks, run.layout.transition, run.layout.window) == (2, 1, 2)
    batch = source_of(run.dataset, "train", run.layout).build(np.arange(4))
    with torch.no_grad():
        torch.testing.assert_close(
            AutoModel.from_pretrained(tmp_path / "out").eval()(batch), run.model(batch, run.objective).logits
        )
    assert "a mean of the sinks of each of 2" in (tmp_path / "out" / "README.md").read_text()

    scorer, dataset = Scorer.load(str(tmp_path / "out")), Dataset(data.uri)
    expected, compared = evaluated(spec.run_dir, "train"), 0
    for number, (user, event) in enumerate(zip(expected.users.tolist(), expected.events.tolist(), strict=True)):
        place = number - int(np.flatnonzero(expected.users == user)[0])
        if examples == "per_user" and (place % 3 != 2 or event < 4):
            continue  # the last target of a whole piece alone sees what a request shows
        request = request_of(dataset, user, event)
        assert scorer.score(request)[0] == pytest.approx(expected.probabilities[number], abs=1e-5)
        compared += 1
    assert compared >= 4
    assert np.ptp(expected.probabilities) > 0.02
    many = scorer.score(request_of(dataset, 2, 5, [0, 1, 2, 3]))
    alone = [scorer.score(request_of(dataset, 2, 5, [item]))[0] for item in range(4)]
    np.testing.assert_allclose(many, alone, atol=1e-5)
    nearest = scorer.nearest(request_of(dataset, 2, 5), 0)
    assert nearest
    assert 0 < sum(share for _, share in nearest) <= 1 + 1e-5


@pytest.mark.parametrize("attention", ["blocks", "sdpa"])
def test_a_run_trains_stops_resumes_and_is_measured(tmp_path: Path, attention: str) -> None:
    uri = prepared_data(str(tmp_path / "data"))
    changes = {
        "data": {"examples": "per_user", "history": 6, "text_history": 0},
        "model": {"sparse": SPARSE, "bias": None, "attention": attention, "backbone": {"config": {"attention_dropout": 0.0}}},
        "train": {"zero_stage": 0},
        "runtime": {"kind": "local", "workers": 1},
    }
    tree = merge(small_run(uri, str(tmp_path / "run")), changes)
    for stage in tree["stages"]:
        stage["steps"] = 2
    spec = parse_run(tree, "test")
    assert not start(spec, stop_after=1)["finished"]
    result = start(spec, resume=True)
    assert (result["finished"], result["steps"]) == (True, 4)
    assert 0 <= result["evaluation"]["test"]["auc"] <= 1
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    assert '"loss"' in metrics
    assert "nan" not in metrics.lower()
