"""What a pass holds is found without its memory: as much as the same pass holds with it, in every family."""

from typing import Any

import numpy as np
import pytest
import torch

from ctrsink.config import RunSpec, parse_run
from ctrsink.config.load import merge
from ctrsink.config.stages import StageSpec
from ctrsink.dataset.reader import Dataset
from ctrsink.estimate.activations import Activations, Peak, activations_of
from ctrsink.families.facts import Facts
from ctrsink.families.parameters import set_trainable
from ctrsink.families.registry import family_of, source_of
from ctrsink.sequences.batch import Batch
from ctrsink.stream.stream import SequenceSource
from tests import runs, test_families_runs
from tests.runs import prepared_data

FACTS = Facts(300)
DECODERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"train": {"precision": "bf16"}},
    "checkpointed": {"model": {"gradient_checkpointing": True}},
    "lora": {"model": {"lora": {"rank": 2}}, "stages": {1: {"trainable": ["sink", "head", "lora"], "lr": {"lora": 0.01}}}},
    "blocks": {"model": {"attention": "blocks"}},
    "told": {"model": {"temporal": True, "target": {"signals": ["item_mean", "item_count"]}}},
    "by chunks": {
        "data": {"text_history": 0, "examples": "per_target", "targets": 1},
        "model": {"bias": None, "sparse": {"chunks": 2, "window": 2, "transition": 1, "summary_bias": True}},
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepared_data(str(tmp_path_factory.mktemp("activations") / "data"))


def foreseen(spec: RunSpec, stage: StageSpec) -> tuple[SequenceSource, Activations]:
    family = family_of(spec.model.family)
    dataset = Dataset.of(spec.data)
    source = source_of(dataset, "train", family.layout(spec.data, spec.model, dataset.manifest))
    shape = family.shape(family.portable(spec.model), FACTS, spec.train.precision).train()
    set_trainable(shape, stage.trainable)
    return source, activations_of(shape, source, stage.learns)


def held_by(spec: RunSpec, stage: StageSpec, batch: Batch) -> int:
    """What the pass really holds, beside weights and gradients."""
    family = family_of(spec.model.family)
    model = family.build(family.portable(spec.model), FACTS, 0, spec.train.precision).train()
    set_trainable(model, stage.trainable)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    with Peak([*model.parameters(), *model.buffers(), *grads]) as peak:
        model(model.drawn(batch, stage.learns, 0), stage.learns).loss.backward()
    return peak.most


def check(spec: RunSpec, stage: StageSpec, within: float) -> None:
    """Batches of one long sequence several times hold what was foreseen; one of short ones does not hold much more."""
    source, found = foreseen(spec, stage)
    for times in (4, 9, 24):
        batch = source.build(source.some().repeat(times))
        assert found.bytes(batch.tokens) == pytest.approx(held_by(spec, stage, batch), rel=within)
    batch = source.build(np.arange(8))
    assert held_by(spec, stage, batch) <= 1.6 * found.bytes(batch.tokens)  # these models are narrow: what is padded counts much


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_foreseen(name: str, data: str) -> None:
    spec = parse_run(merge(runs.run_tree(data, "run"), DECODERS[name]), "test")
    check(spec, spec.stages[1], 0.02)


@pytest.mark.parametrize("name", [*test_families_runs.SMALL, "srp, foretelling"])
def test_every_family_without_text_is_foreseen(name: str, data: str) -> None:
    family, _, what = name.partition(", ")
    spec = parse_run(test_families_runs.tree_of(family, data, "run", "per_target"), "test")
    check(spec, spec.stages[0 if what == "foretelling" else 1], 0.2)


def test_of_sharded_tables_the_rows_that_are_fetched_are_foreseen(data: str) -> None:
    """Each as often as it is named, however many rows there are."""
    changes = {"model": {"id_tables": "sharded", "rows": 10**9}}
    spec = parse_run(test_families_runs.tree_of("din", data, "run", "per_target", **changes), "test")
    _, found = foreseen(spec, spec.stages[1])
    few = parse_run(test_families_runs.tree_of("din", data, "run", "per_target", model={"id_tables": "sharded"}), "test")
    assert foreseen(few, few.stages[1])[1] == found
    assert 0 < found.bytes(100) < 10**6


def test_as_many_tokens_fit_as_the_line_says() -> None:
    line = Activations(100.0, 10.0)
    assert line.tokens(200) == 10
    assert line.bytes(line.tokens(1234)) <= 1234 < line.bytes(line.tokens(1234) + 1)
    assert line.tokens(50) == 0
