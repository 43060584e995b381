"""Runs whose result would only look like one are told so when they start and when they end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from ctrsink import logs
from ctrsink.config import RunSpec, parse_run
from ctrsink.config.train import EvaluateSpec
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.reader import Dataset
from ctrsink.dist import Topology
from ctrsink.evaluate import evaluator
from ctrsink.evaluate.evaluator import evaluate_splits
from ctrsink.evaluate.predictions import Predictions
from ctrsink.families.protocol import Out
from ctrsink.report.figures import compare_runs
from ctrsink.runtime.start import start
from ctrsink.sequences.batch import Batch
from ctrsink.train.observe.advice import advice
from tests.builders import run_tree
from tests.runs import prepared_data
from tests.runs import run_tree as short_run


def spec_of(batch: int, **stage: Any) -> RunSpec:
    tree = run_tree(train={"batch_size": batch, "micro_batch_size": 1})
    tree["stages"][0] |= {"steps": None, "epochs": 1} | stage
    return parse_run(tree, "test")


def test_too_few_steps_and_a_batch_beyond_the_data_are_told_with_what_to_change() -> None:
    assert advice(spec_of(32), 10_000, 313) == []
    assert advice(spec_of(64), 10_000, None) == []
    (few,) = advice(spec_of(64), 10_000, 157)
    assert few == (
        "the run makes 157 optimiser steps, and with fewer than 300 most models are far from what they could learn: "
        "lower train.batch_size from 64 to 33 or so, or raise epochs or steps of the stages"
    )
    (few,) = advice(spec_of(1), 100, 100)
    assert few.endswith("what they could learn: raise epochs or steps of the stages")
    large, _ = advice(spec_of(64), 50, 1)
    assert large == (
        "stages.one: a batch of 64 sequences is larger than the train split, which has 50: every step repeats them; "
        "lower train.batch_size to 5 or less"
    )
    large, few = advice(spec_of(8, batch_size=64), 50, 1)
    assert "lower stages.0.batch_size to 5 or less" in large
    assert "the run makes 1 optimiser step, " in few
    assert "lower stages.0.batch_size from 64 to 1 or so" in few


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("data") / "set"))


def test_a_run_says_so_at_its_start_once(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = parse_run(short_run(data, str(tmp_path / "run"), train={"batch_size": 200}), "test")
    start(spec, stop_after=1)
    said = capsys.readouterr().err
    assert "WARNING stages.align: a batch of 200 sequences is larger than the train split" in said
    assert "WARNING the run makes 20 optimiser steps" in said
    assert said.index("the run makes 20") < said.index("step 1/20")
    start(spec, resume=True, stop_after=1)
    assert "the run makes" not in capsys.readouterr().err


@pytest.mark.parametrize(("worth", "says"), [(0.0, True), (2.0, False)])
def test_a_model_that_gained_nothing_is_said_to_be_no_better_than_the_mean(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, worth: float, says: bool
) -> None:
    """In the log at the end, and in the figures."""
    chance = np.random.default_rng(0)
    labels = (chance.random(400) < 0.3).astype(np.int8)
    chances = 1 / (1 + np.exp(-(worth * (2 * labels - 1) + 0.3 * chance.normal(size=400))))
    found = Predictions(np.repeat(np.arange(4), 100), np.tile(np.arange(100), 4), labels, chances)
    dataset, spec = Dataset(data), EvaluateSpec(splits=("test",))
    monkeypatch.setattr(evaluator, "predicted", lambda *_: iter([found]))
    logs.configure()
    layout = Layout("decoder", "per_target", 3, 1)

    def forward(batch: Batch) -> Out:
        return Out(batch.targets.labels.sum(), batch.targets.labels)

    evaluate_splits(forward, dataset, layout, spec, str(tmp_path / "run"), 1, Topology())
    said = capsys.readouterr().err
    assert ("WARNING test: the model is not better than always predicting the mean click rate" in said) == says
    texts: list[str] = []
    plot = Axes.plot

    def recorded(self: Axes, *args: Any, **named: Any) -> Any:
        texts.append(str(named.get("label")))
        return plot(self, *args, **named)

    monkeypatch.setattr(Axes, "plot", recorded)
    compare_runs({"mine": str(tmp_path / "run")}, str(tmp_path / "figure.png"))
    assert any("no better than the mean" in text for text in texts) == says
