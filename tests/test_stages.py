"""The stage controller and its learning rates."""

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrsink.config import parse_run
from ctrsink.config.stages import ScheduleSpec, StageSpec
from ctrsink.errors import InputError
from ctrsink.train.stages import StageController, lengths, schedule
from tests.builders import run_tree


def stage(name: str = "s", **fields: object) -> StageSpec:
    return StageSpec.model_validate({"name": name, "trainable": ["head"], "lr": {"head": 0.1}, **fields})


def spec_of(stages: tuple[StageSpec, ...], batch: int, order: str = "shuffled") -> Any:
    tree = run_tree(
        stages=[s.model_dump() for s in stages],
        train={"batch_size": batch, "micro_batch_size": batch, "validation": {"every": 1}},
        data={"uri": "data", "order": order},
    )
    return parse_run(tree, "test")


def controller(*stages: StageSpec, sequences: int = 100, batch: int = 10) -> StageController:
    return StageController(spec_of(stages, batch), sequences)


def run(made: StageController, aucs: list[float] | None = None, at_most: int = 10_000) -> list[str]:
    """The stage of each step until the end; after each step the next of `aucs` is observed, if there are any."""
    seen: list[str] = []
    while not made.finished and len(seen) < at_most:
        made.advance()
        seen.append(made.stage.name)
        made.after_step()
        if aucs:
            made.observe({"auc": aucs.pop(0)})
    return seen


given_lengths = st.one_of(
    st.integers(1, 30).map(lambda n: {"steps": n}),
    st.integers(1, 200).map(lambda n: {"epochs": n / 100}),
    st.tuples(st.integers(1, 30), st.integers(1, 200), st.sampled_from(["any", "all"])).map(
        lambda t: {"steps": t[0], "epochs": t[1] / 100, "until": t[2]}
    ),
)


@given(st.lists(given_lengths, min_size=1, max_size=4), st.integers(1, 500), st.integers(1, 64))
def test_stages_follow_each_other_without_gap(fields: list[dict[str, Any]], sequences: int, batch: int) -> None:
    stages = tuple(stage(str(i), **f) for i, f in enumerate(fields))
    found = lengths(spec_of(stages, batch), sequences)
    made = controller(*stages, sequences=sequences, batch=batch)
    assert made.last_step == sum(found)
    assert run(made) == [str(i) for i, length in enumerate(found) for _ in range(length)]
    assert made.step == made.last_step
    for length, f in zip(found, fields, strict=True):
        epochs = math.ceil(Fraction(round(100 * f["epochs"]), 100) * sequences / batch) if "epochs" in f else None
        both = [n for n in (f.get("steps"), epochs) if n is not None]
        assert length == (max(both) if f.get("until") == "all" else min(both))


@given(st.lists(given_lengths, min_size=1, max_size=3), st.lists(st.floats(0, 1), min_size=60, max_size=60), st.data())
def test_a_controller_goes_on_from_its_state_anywhere(
    fields: list[dict[str, Any]], aucs: list[float], data: st.DataObject
) -> None:
    """Also between two stages, and with a plateau half counted."""
    plateau = {"plateau": {"patience": 2}}
    stages = tuple(stage(str(i), **(f | plateau | {"until": "any"})) for i, f in enumerate(fields))
    whole = controller(*stages)
    seen = run(whole, list(aucs))
    cut = data.draw(st.integers(0, len(seen)))
    first = controller(*stages)
    before = run(first, list(aucs), at_most=cut)
    second = controller(*stages)
    second.load_state_dict(first.state_dict())
    after = run(second, list(aucs[cut:]))
    assert before + after == seen
    assert second.state_dict() == whole.state_dict()


@given(st.integers(1, 400), st.integers(1, 100_000), st.integers(1, 512))
def test_epochs_become_as_few_steps_as_hold_them(hundredths: int, sequences: int, batch: int) -> None:
    """In exact arithmetic: 1.1 epochs of 100 sequences are 110, not the 111 that floating point makes of them."""
    exact = math.ceil(Fraction(hundredths, 100) * sequences / batch)
    assert lengths(spec_of((stage(epochs=hundredths / 100),), batch), sequences) == [exact]


def test_the_hair_above_a_whole_number_makes_no_step() -> None:
    assert 1.1 * 100 / 10 > 11
    assert lengths(spec_of((stage(epochs=1.1),), 10), 100) == [11]
    assert lengths(spec_of((stage(epochs=1e-12),), 10), 100) == [1]


def test_steps_do_not_depend_on_the_data() -> None:
    assert lengths(spec_of((stage(steps=7),), 1), 1) == lengths(spec_of((stage(steps=7),), 32), 10**6) == [7]


def test_a_stage_may_have_a_batch_of_its_own() -> None:
    assert lengths(spec_of((stage("a", epochs=1, batch_size=5), stage("b", epochs=1)), 10), 100) == [20, 10]


def test_a_plateau_ends_a_stage_when_nothing_improves() -> None:
    fields = {"plateau": {"patience": 2, "min_delta": 0.01}, "schedule": {"kind": "constant", "warmup": 0}}
    made = controller(stage("one", **fields), stage("two", steps=3))
    assert made.last_step is None
    # 0.705 is no improvement by 0.01 over 0.70; 0.72 is.
    aucs = [0.6, 0.7, 0.705, 0.72, 0.7, 0.71, *[0.5] * 3]
    assert run(made, aucs) == ["one"] * 6 + ["two"] * 3
    assert made.last_step == 9


def test_a_plateau_of_the_log_loss_watches_it_fall() -> None:
    made = controller(stage(steps=50, plateau={"metric": "logloss", "patience": 1}))
    for value in (0.7, 0.6, 0.65):
        assert not made.finished
        made.after_step()
        made.observe({"logloss": value})
    assert made.finished


def test_until_all_waits_for_the_last_condition() -> None:
    rising = [0.5 + 0.01 * i for i in range(8)]
    at_once = stage(steps=5, plateau={"patience": 1}, until="all")
    assert len(run(controller(at_once), [*rising, 0.1])) == 9  # past the 5 steps, until it no longer rises
    assert len(run(controller(at_once), [0.5, 0.4, 0.3, 0.2, 0.1, 0.0])) == 5
    assert len(run(controller(stage(steps=5, plateau={"patience": 1})), [0.5, 0.4])) == 2


def test_a_rate_stays_at_its_end_behind_the_length() -> None:
    made = controller(
        stage(steps=3, plateau={"patience": 1}, until="all", schedule={"kind": "linear", "warmup": 0, "final": 0.1})
    )
    factors = []
    for auc in (0.5, 0.6, 0.7, 0.8, 0.9):
        factors.append(made.factor())
        made.after_step()
        made.observe({"auc": auc})
    assert factors == pytest.approx([1, 0.55, 0.1, 0.1, 0.1])


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
    made = controller(stage("a", steps=10, **fields), stage("b", steps=10, **fields))
    factors = []
    while not made.finished:
        made.advance()
        factors.append(made.factor())
        made.after_step()
    assert factors[:10] == factors[10:]
    assert factors[0] == 0.5
    assert factors[9] == 0


def test_halfway_down_a_cosine_is_the_middle() -> None:
    spec = ScheduleSpec(kind="cosine", warmup=0, final=0.2)
    assert schedule(spec, 50, 101) == pytest.approx(0.6)
    assert schedule(spec, 10, 101) > 0.95


ENDLESS = {"epochs": 1, "schedule": {"kind": "constant", "warmup": 0}}


@given(st.integers(1, 64), st.integers(1, 20), st.integers(0, 5000), st.integers(0, 5000))
def test_in_chronological_order_the_last_stage_ends_with_the_data_and_grows_with_them(
    batch: int, warming: int, sequences: int, more: int
) -> None:
    spec = spec_of((stage("warm", steps=warming), stage("all", **ENDLESS)), batch, "chronological")
    sequences += (warming + 1) * batch
    for count in (sequences, sequences + more):
        assert lengths(spec, count) == [warming, count // batch - warming]


def test_a_run_that_had_ended_goes_on_when_its_data_have_grown() -> None:
    spec = spec_of((stage("warm", steps=2), stage("all", **ENDLESS)), 10, "chronological")
    before = StageController(spec, 50)
    assert run(before) == ["warm"] * 2 + ["all"] * 3
    after = StageController(spec, 70)
    after.load_state_dict(before.state_dict())
    assert run(after) == ["all"] * 2


def test_chronological_order_needs_data_for_its_last_stage() -> None:
    spec = spec_of((stage("warm", steps=10), stage("all", **ENDLESS)), 10, "chronological")
    with pytest.raises(InputError, match="100 sequences, and the stages before all take 100 of them: that leaves no batch of 10"):
        lengths(spec, 100)


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ({"epochs": 0.5}, ENDLESS, "stages.warm: data.order chronological needs steps"),
        ({"steps": 5, "plateau": {}}, ENDLESS, "stages.warm: data.order chronological needs steps"),
        ({"steps": 5}, {"steps": 5}, "stages.all: the last stage in data.order chronological has epochs: 1"),
        ({"steps": 5}, ENDLESS | {"epochs": 2}, "stages.all: the last stage in data.order chronological has epochs: 1"),
        ({"steps": 5}, {"epochs": 1}, "stages.all: in data.order chronological the last stage grows with the data"),
    ],
)
def test_what_would_change_with_the_data_is_refused(first: dict, last: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        spec_of((stage("warm", **first), stage("all", **last)), 10, "chronological")
