"""What a sequence costs, and that a step stays the same sequences however they are dealt, on ranks that do about as much."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.config import parse_run
from ctrsink.config.stages import Objective
from ctrsink.dataset.reader import Dataset
from ctrsink.families.parameters import set_trainable
from ctrsink.families.registry import FAMILIES, family_of, source_of
from ctrsink.runtime.preflight import vocabulary_of
from ctrsink.sequences.batch import Batch
from ctrsink.stream.price import Price
from ctrsink.stream.stream import SequenceSource, TrainStream
from ctrsink.train.balance import price_of
from tests.builders import layout_of, make_dataset, tiny_model, tiny_spec
from tests.runs import prepared_data, run_tree
from tests.test_families_runs import tree_of

LAYOUTS = {
    "per_target": layout_of("per_target", 4),
    "per_user": layout_of("per_user", 3, 5),
    "per_request": replace(layout_of("per_request", 4), targets=3),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(make_dataset(tmp_path_factory.mktemp("log"), users=20))


def targets_of(batch: Batch) -> list[tuple[int, int]]:
    of = batch.targets
    return list(zip(of.users[of.counted].tolist(), of.events[of.counted].tolist(), strict=True))


def test_a_price_is_one_event_and_what_it_pays_for_each_other() -> None:
    assert Price(0.5).of(np.array([1, 2, 10])).tolist() == [1.5, 4, 60]
    assert Price().of(np.array([7])).tolist() == [7]


@pytest.mark.parametrize("examples", sorted(LAYOUTS))
def test_costs_follow_the_flops_of_sequences(dataset: Dataset, examples: str) -> None:
    """Known but for the lengths of texts and, of a request, how many of its piece came before it."""
    source = source_of(dataset, "train", LAYOUTS[examples])
    model = tiny_model(tiny_spec())
    set_trainable(model, ("sink", "bias", "head", "backbone"))
    price = price_of(model, source, Objective())
    assert price == price_of(model, source_of(dataset, "train", LAYOUTS[examples]), Objective())
    assert 0.0001 < price.pairs < 1
    assert price.together == 1
    ids = np.arange(sum(source.per_shard))
    count = model.flop_count(Objective())
    flops = np.array([count(batch).total for batch in source.build_all([ids[[i]] for i in ids], [None] * len(ids))])
    assert np.corrcoef(source.costs(*source.sizes(ids), price), flops)[0, 1] > 0.8


def test_impressions_of_a_request_share_a_history(dataset: Dataset) -> None:
    source = source_of(dataset, "train", LAYOUTS["per_request"])
    ids = np.arange(sum(source.per_shard))
    targets, events = source.impressions(ids), source.lengths(ids)
    alone, shared = (source.costs(*source.sizes(ids), Price(0, together)) for together in (1, 3))
    assert alone.tolist() == (targets * (events - targets + 1)).tolist()
    assert shared.tolist() == pytest.approx((targets / 3 * (events - targets + 3)).tolist())


def streams(source: SequenceSource, world: int, tokens: int | None, lockstep: bool, price: Price) -> list[TrainStream]:
    accumulation = 2
    return [
        TrainStream(source, 5, 2, 24, accumulation, rank, world, tokens=tokens, price=price, lockstep=lockstep)
        for rank in range(world)
    ]


@settings(max_examples=40, deadline=None)
@given(
    world=st.integers(1, 7),
    examples=st.sampled_from(sorted(LAYOUTS)),
    tokens=st.sampled_from([None, 1, 60]),
    lockstep=st.booleans(),
    pairs=st.sampled_from([0.0, 0.01, 3.0]),
    position=st.integers(0, 90),
)
def test_a_step_is_the_same_sequences_however_they_are_dealt(
    dataset: Dataset, world: int, examples: str, tokens: int | None, lockstep: bool, pairs: float, position: int
) -> None:
    source = source_of(dataset, "train", LAYOUTS[examples])
    (alone,) = streams(source, 1, None, True, Price())
    expected = alone.step(position)
    steps = [stream.step(position) for stream in streams(source, world, tokens, lockstep, Price(pairs))]
    found = Counter(target for step in steps for batch in step.micro_batches for target in targets_of(batch))
    assert found == Counter(target for batch in expected.micro_batches for target in targets_of(batch))
    assert {(step.impressions, step.position) for step in steps} == {(expected.impressions, expected.position)}
    assert tokens is not None or {len(step.micro_batches) for step in steps} == {2}
    assert all((step.filler is None) == (tokens is None) for step in steps)


def test_ranks_of_a_run_get_about_as_much(tmp_path: Path) -> None:
    """Of 64 users with chronologies of 1 to 20 events; the first rank used to get the longest of each row."""
    source = source_of(Dataset(make_dataset(tmp_path, users=64)), "train", layout_of("per_user", 0, 50))
    model = tiny_model(tiny_spec())
    set_trainable(model, ("sink", "bias", "head", "backbone"))
    price, count, most = price_of(model, source, Objective()), model.flop_count(Objective()), []
    for lockstep, tokens in ((True, None), (False, None), (True, 90), (False, 90)):
        loads = []
        for stream in streams(source, 3, tokens, lockstep, price):
            loads.append(sum(count(batch).total for step in stream.steps(0, 2) for batch in step.micro_batches))
        most.append(max(loads) / np.mean(loads))
    assert max(most) < 1.15, most


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_price_in_each_of_its_stages(name: str, tmp_path: Path) -> None:
    data = prepared_data(str(tmp_path / "data"), users=12)
    tree = run_tree(data, "run") if name == "decoder" else tree_of(name, data, "run", "per_target")
    spec = parse_run(tree, "test")
    family, dataset = family_of(name), Dataset(data)
    facts = family.check(spec, dataset.manifest, lambda: vocabulary_of(data))
    model = family.build(spec.model, facts, 0)
    source = source_of(dataset, "train", family.layout(spec.data, spec.model, dataset.manifest))
    for stage in spec.stages:
        set_trainable(model, stage.trainable)
        price = price_of(model, source, stage.learns)
        assert 0 <= price.pairs < 10
        assert (source.costs(*source.sizes(np.arange(20)), price) >= 1).all()
