"""The stage plan and its learning rates."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrsink.config import parse_run
from ctrsink.config.stages import ScheduleSpec, StageSpec
from ctrsink.errors import InputError
from ctrsink.train import stages as stage_plan
from ctrsink.train.stages import StageWindow, schedule
from tests.builders import run_tree


def stage(name: str = "s", **fields: object) -> StageSpec:
    return StageSpec.model_validate({"name": name, "trainable": ["head"], "lr": {"head": 0.1}, **fields})


def plan(stages: tuple[StageSpec, ...], sequences: int, batch: int, order: str = "shuffled") -> list[StageWindow]:
    tree = run_tree(
        stages=[s.model_dump() for s in stages],
        train={"batch_size": batch, "micro_batch_size": batch},
        data={"uri": "data", "order": order},
    )
    return stage_plan.plan(parse_run(tree, "test"), sequences)


lengths = st.one_of(
    st.integers(1, 50).map(lambda n: {"steps": n}),
    st.integers(1, 400).map(lambda n: {"epochs": n / 100}),
)


@given(st.lists(lengths, min_size=1, max_size=4), st.integers(1, 5000), st.integers(1, 64))
def test_stages_follow_each_other_without_gap(fields: list[dict[str, float]], sequences: int, batch: int) -> None:
    stages = tuple(stage(str(i), **f) for i, f in enumerate(fields))
    windows = plan(stages, sequences, batch)
    assert [w.index for w in windows] == list(range(len(stages)))
    assert [w.spec for w in windows] == list(stages)
    assert windows[0].first == 0
    assert all(a.end == b.first for a, b in pairwise(windows))
    assert all(w.end > w.first for w in windows)


@given(st.integers(1, 400), st.integers(1, 100_000), st.integers(1, 512))
def test_epochs_become_as_few_steps_as_hold_them(hundredths: int, sequences: int, batch: int) -> None:
    """In exact arithmetic: 1.1 epochs of 100 sequences are 110, not the 111 that floating point makes of them."""
    exact = math.ceil(Fraction(hundredths, 100) * sequences / batch)
    assert plan((stage(epochs=hundredths / 100),), sequences, batch)[0].end == exact


def test_the_hair_above_a_whole_number_makes_no_step() -> None:
    assert 1.1 * 100 / 10 > 11
    assert plan((stage(epochs=1.1),), 100, 10)[0].end == 11
    assert plan((stage(epochs=1e-12),), 100, 10)[0].end == 1


def test_steps_do_not_depend_on_the_data() -> None:
    assert plan((stage(steps=7),), 1, 1)[0].end == plan((stage(steps=7),), 10**6, 32)[0].end == 7


specs = st.builds(
    lambda kind, warmup, final: ScheduleSpec(kind=kind, warmup=warmup, final=final),
    st.sampled_from(["constant", "linear", "cosine"]),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1),
)


@given(specs, st.integers(1, 300))
def test_a_schedule_rises_to_one_and_falls_to_its_end(spec: ScheduleSpec, steps: int) -> None:
    factors = [schedule(spec, step, steps) for step in range(steps)]
    assert all(0 <= f <= 1 + 1e-12 for f in factors)
    warmup = round(spec.warmup * steps)
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == [pytest.approx((i + 1) / warmup) for i in range(warmup)]
    assert all(a >= b - 1e-12 for a, b in pairwise(falling))
    if falling:
        assert falling[0] == pytest.approx(1)
    if len(falling) > 1:
        assert falling[-1] == pytest.approx(1 if spec.kind == "constant" else spec.final)
    assert factors[0] > 0  # a step that learns nothing would be lost


def test_a_stage_has_a_schedule_of_its_own() -> None:
    fields = {"schedule": {"kind": "linear", "warmup": 0.2, "final": 0.0}}
    first, second = plan((stage("a", steps=10, **fields), stage("b", steps=10, **fields)), 5, 1)
    assert [first.factor(s) for s in range(10)] == [second.factor(s) for s in range(10, 20)]
    assert first.factor(0) == 0.5
    assert first.factor(9) == 0


def test_halfway_down_a_cosine_is_the_middle() -> None:
    spec = ScheduleSpec(kind="cosine", warmup=0, final=0.2)
    assert schedule(spec, 50, 101) == pytest.approx(0.6)
    assert schedule(spec, 10, 101) > 0.95


ENDLESS = {"epochs": 1, "schedule": {"kind": "constant", "warmup": 0}}


@given(st.integers(1, 64), st.integers(1, 20), st.integers(0, 5000), st.integers(0, 5000))
def test_in_chronological_order_the_last_stage_ends_with_the_data_and_grows_with_them(
    batch: int, warming: int, sequences: int, more: int
) -> None:
    stages = (stage("warm", steps=warming), stage("all", **ENDLESS))
    sequences += (warming + 1) * batch
    before, after = (plan(stages, n, batch, "chronological") for n in (sequences, sequences + more))
    assert before[0] == after[0]
    assert [w[-1].first for w in (before, after)] == [warming, warming]
    assert [w[-1].end for w in (before, after)] == [sequences // batch, (sequences + more) // batch]
    assert {w.factor(step) for w in (before[1], after[1]) for step in (warming, sequences // batch - 1)} == {1.0}


def test_chronological_order_needs_data_for_its_last_stage() -> None:
    with pytest.raises(InputError, match="100 sequences are 10 batches of 10, but the stages before all take 10 steps"):
        plan((stage("warm", steps=10), stage("all", **ENDLESS)), 100, 10, "chronological")


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ({"epochs": 0.5}, ENDLESS, "stages.warm: data.order chronological needs steps"),
        ({"steps": 5}, {"steps": 5}, "stages.all: the last stage in data.order chronological has epochs: 1"),
        ({"steps": 5}, ENDLESS | {"epochs": 2}, "stages.all: the last stage in data.order chronological has epochs: 1"),
        ({"steps": 5}, {"epochs": 1}, "stages.all: in data.order chronological the last stage grows with the data"),
    ],
)
def test_what_would_change_with_the_data_is_refused(first: dict, last: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan((stage("warm", **first), stage("all", **last)), 100, 10, "chronological")
