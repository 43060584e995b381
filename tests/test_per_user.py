"""A user's chronology in one pass: windows, the temporal bias, and the two traps that DTI names (arXiv 2503.01001)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.attention.kinds import FEEDBACK, PREFIX, SINK, TEXT
from ctrsink.config import parse_run
from ctrsink.config.model import BiasSpec
from ctrsink.config.stages import Objective, ReadoutSpec
from ctrsink.dataset.events import UserEvents
from ctrsink.dataset.layout import Layout
from ctrsink.errors import InputError
from ctrsink.families.decoder.model import CTRModel
from ctrsink.families.decoder.temporal import TemporalBias
from ctrsink.sequences.batch import Batch
from tests.builders import (
    batch_of,
    layout_of,
    random_batch,
    random_chronology,
    random_sequences,
    rows_of,
    run_tree,
    tiny_model,
    tiny_spec,
    told_sequence,
)
from tests.padded import changed, of_targets, padded, same
from tests.test_attention import input_gradient, run, run_dense

ALL, SINKS = Objective(readout=ReadoutSpec(over="all")), Objective(readout=ReadoutSpec(over="sinks"))
close = torch.testing.assert_close


def model_of(layers: int = 2, window: int | None = None, temporal: bool = False, **more: Any) -> CTRModel:
    """A tiny model; its temporal bias is random, and its scales large enough to be seen."""
    spec = tiny_spec(layers=layers, bias=BiasSpec(layers=1.0, gamma=2.0), **more)
    model = tiny_model(spec.model_copy(update={"window": window, "temporal": temporal}))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.temporal.parameters():
        parameter.data.normal_(generator=generator)
    return model


@settings(max_examples=20)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(1, 8), min_size=1, max_size=3),
    st.sampled_from(["per_user", "per_target"]),
    st.sampled_from([ALL, SINKS]),
    st.sampled_from([None, 1, 2, 4]),
    st.booleans(),
    st.sampled_from([None, "vectors"]),
)
def test_windows_and_biases_of_readouts_equal_the_dense_form(
    seed: int, events: list[int], examples: str, objective: Objective, window: int | None, temporal: bool, similarity: str | None
) -> None:
    model = model_of(window=window, temporal=temporal, similarity=similarity)
    batch = random_batch(seed, layout_of(examples, similarity=similarity), tuple(events))
    (logits, grads), (expected, others) = run(model, batch, objective), run_dense(model, batch, objective)
    close(logits, expected, atol=1e-5, rtol=1e-5)
    for name, grad in grads.items():
        bound = 1e-5 * max(1.0, float(grad.abs().max()))
        close(grad, others[name], atol=bound, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("objective", [ALL, SINKS], ids=["all", "sinks"])
def test_in_one_layer_a_target_sees_the_events_of_its_window_only(objective: Objective) -> None:
    batch = random_batch(6, layout_of(history=9), (9,))
    kinds, events = padded(batch).kinds[0], padded(batch).events[0]
    gap = int(events.max()) - events
    far = (gap > 3) & (events > 0)
    near = (gap <= 3) & (kinds == SINK)
    assert far.any()
    assert near.any()
    gradient = input_gradient(model_of(layers=1, window=3), batch, objective)
    assert not gradient[far].any()
    assert (gradient[near] > 0).all()
    assert (gradient[kinds == PREFIX] > 0).all()
    # Windows of several layers add up: each goes back as far again.
    twice = input_gradient(model_of(layers=2, window=3), batch, objective)
    assert not twice[(gap > 6) & (events > 0)].any()
    assert (twice[(gap > 3) & (gap <= 6) & (kinds == SINK)] > 0).all()


def chronology_of(events: int, seed: int = 3) -> UserEvents:
    return random_chronology(np.random.default_rng(seed), events)


def piece(chronology: UserEvents, first: int, count: int, layout: Layout) -> Batch:
    return batch_of([told_sequence(chronology, np.arange(first, first + count), layout)])


@pytest.mark.parametrize("window", [None, 2])
@given(st.integers(0, 2**32), st.integers(0, 4), st.integers(5, 10), st.integers(1, 4))
@settings(max_examples=15)
def test_what_is_older_than_the_history_never_leaks(window: int | None, seed: int, history: int, first: int, count: int) -> None:
    """However many layers: another past, and nothing of the piece changes. Its oldest gap tells when the event before was."""
    chronology, layout = chronology_of(14), layout_of(history=history, targets=count)
    chance = np.random.default_rng(seed)
    oldest = first - history
    older = np.arange(14) < oldest
    altered = UserEvents(
        np.where(older, chance.integers(0, 5, 14), chronology.texts),
        np.where(older, chance.integers(0, 3, 14), chronology.feedbacks),
        np.where(np.arange(14) < oldest - 1, chronology.timestamps - 10**8, chronology.timestamps),
        np.where(older, 1 - chronology.labels, chronology.labels).astype(np.int8),
    )
    one, other = piece(chronology, first, count, layout), piece(altered, first, count, layout)
    assert same(one, other)
    model = model_of(layers=4, window=window, temporal=True)
    with torch.no_grad():
        assert torch.equal(model(one, ALL).logits, model(other, ALL).logits)
        # The test can fail: the oldest event that is in the piece matters to some target of it.
        if history and window is None:
            inside = one.inputs["event_ids"].eq(1) & one.inputs["kinds"].eq(TEXT)
            moved = one.inputs["input_ids"].clone()
            moved[inside] = (moved[inside] + 1) % 90
            assert not torch.equal(model(changed(one, input_ids=moved), ALL).logits, model(one, ALL).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("objective", [ALL, SINKS], ids=["all", "sinks"])
def test_where_a_sequence_lies_cannot_be_learned(kind: str, objective: Objective) -> None:
    """Positions are relative: a constant added to all of them changes nothing."""
    model, batch = model_of(kind=kind, temporal=True), random_batch(2, layout_of(), (8, 3))
    with torch.no_grad():
        positions, logits = batch.inputs["position_ids"], model(batch, objective).logits
        for shift in (1, 100, 900):
            moved = changed(batch, position_ids=positions + shift)
            assert (model(moved, objective).logits - logits).abs().max() < 1e-4
        # Relative ones count, or the test would show nothing.
        spread = changed(batch, position_ids=positions * 2)
        assert (model(spread, objective).logits - logits).abs().max() > 1e-3


def test_signals_of_per_user_tell_nothing_of_the_target() -> None:
    data = {"uri": "data", "examples": "per_user"}
    for signal in ("recency_rank", "time_gap"):
        model = {"backbone": {"config": {"model_type": "llama"}}, "sinks": {"signals": [signal]}, "temporal": True}
        with pytest.raises(InputError, match=f"{signal} depends on the target"):
            parse_run(run_tree(data=data, model=model), "test")
        shared = run_tree(data=data | {"examples": "per_request"}, model=model, train={"micro_batch_tokens": 1000})
        assert parse_run(shared, "test").model.temporal


def test_a_stage_may_train_the_temporal_bias_alone() -> None:
    """It is of the group `bias`, also where there is none between sinks."""
    stages = [{"name": "one", "trainable": ["bias"], "lr": {"bias": 0.01}, "steps": 4}]
    model = {"backbone": {"config": {"model_type": "llama"}}, "bias": None}
    assert parse_run(run_tree(model=model | {"temporal": True}, stages=stages), "test").model.temporal
    with pytest.raises(InputError, match=r"trainable bias does not exist, because model\.bias is null"):
        parse_run(run_tree(model=model, stages=stages), "test")
    with pytest.raises(InputError, match="temporal acts from targets to sinks"):
        parse_run(run_tree(model=model | {"temporal": True, "sinks": None}), "test")


def test_the_temporal_bias_is_slope_hour_and_weekday() -> None:
    """By hand: asked on Saturday 1970-01-10 at 01:30:00; seen an hour before, at 00:30, and on Thursday the 1st at 23:59:59."""
    module = TemporalBias(2)
    module.slope.data = torch.tensor([1.0, -2.0])
    module.hour.weight.data = torch.arange(48).float().view(24, 2)
    module.weekday.weight.data = 100 * torch.arange(14).float().view(7, 2)
    day = 86400
    asked, seen = torch.tensor([[9 * day + 5400]]), torch.tensor([[9 * day + 1800, day - 1, 9 * day + 5400]])
    table = module(asked, seen)
    assert table.shape == (1, 2, 1, 3)
    year = math.log1p(365.25 * day)
    gaps = [math.log1p(3600) / year, math.log1p(8 * day + 5401) / year, 0.0]
    # Hours 1 - 0, 1 - 23 = 2 of 24, none; weekdays none, two days, none.
    for head, slope in ((0, 1.0), (1, -2.0)):
        hours, weekdays = [2 + head, 4 + head, head], [100 * head, 100 * (4 + head), 100 * head]
        expected = [slope * gap + hour + day for gap, hour, day in zip(gaps, hours, weekdays, strict=True)]
        close(table[0, head, 0], torch.tensor(expected))
    # A sink is never later than the target; a clock that says so counts as no gap.
    close(module(seen[:, :1], asked)[0, 0, 0, 0] - module.hour.weight[23, 0] - module.weekday.weight[0, 0], torch.tensor(0.0))


@pytest.mark.parametrize("objective", [ALL, SINKS], ids=["all", "sinks"])
def test_the_temporal_bias_starts_as_the_model_without_it(objective: Objective) -> None:
    batch = random_batch(2, layout_of(), (8, 1, 3))
    plain = tiny_model(tiny_spec())
    model = tiny_model(tiny_spec().model_copy(update={"temporal": True}))
    assert [p.abs().max().item() for p in model.temporal.parameters()] == [0.0] * 6
    model.load_state_dict(plain.state_dict(), strict=False)
    (logits, grads), (expected, _) = run(model, batch, objective), run(plain, batch, objective)
    close(logits, expected, atol=1e-6, rtol=1e-6)
    for name, _ in model.temporal.named_parameters():
        assert grads[f"temporal.{name}"].abs().max() > 1e-8, name


def test_the_time_of_a_target_matters_to_that_target_only() -> None:
    batch = random_batch(2, layout_of(), (8, 4))
    later = batch.inputs["asked_times"].clone()
    later[1] += 7 * 3600  # of the first sequence
    model = model_of(temporal=True)
    with torch.no_grad():
        before, after = model(batch, ALL).logits, model(changed(batch, asked_times=later), ALL).logits
    moved = of_targets(batch, before - after).abs() > 1e-6
    # The state at a target's last token is read by what follows it.
    assert moved.nonzero().tolist() == [[0, 1], [0, 2]]
    one = model_of(layers=1, temporal=True)
    with torch.no_grad():
        before, after = one(batch, ALL).logits, one(changed(batch, asked_times=later), ALL).logits
    assert (of_targets(batch, before - after).abs() > 1e-6).nonzero().tolist() == [[0, 1]]


@given(st.integers(1, 9), st.integers(0, 5), st.sampled_from([ALL, SINKS]), st.sampled_from([None, 2]))
@settings(max_examples=15)
def test_a_lone_target_is_the_same_per_user_and_per_target(
    events: int, history: int, objective: Objective, window: int | None
) -> None:
    """In one layer, or over all: `readout: sinks` also restricts the text of a per_user sequence's behaviours."""
    chronology = chronology_of(events)
    model = model_of(layers=2 if objective is ALL else 1, window=window, temporal=True)
    one, other = (piece(chronology, events - 1, 1, layout_of(e, history=history, targets=1)) for e in ("per_user", "per_target"))
    with torch.no_grad():
        close(model(one, objective).logits, model(other, objective).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temporal", [False, True], ids=["plain", "temporal"])
@pytest.mark.parametrize("objective", [ALL, SINKS], ids=["all", "sinks"])
def test_a_batch_without_any_sink_gives_every_parameter_a_gradient_and_sinks_none_of_it(
    objective: Objective, temporal: bool
) -> None:
    batch = random_batch(4, layout_of("per_target", history=0), (5, 3))
    assert not padded(batch).sink_valid.any()
    model = model_of(temporal=temporal)
    logits, grads = run(model, batch, objective)
    assert grads.keys() == dict(model.named_parameters()).keys()
    for name, grad in grads.items():
        if name.split(".")[0] in ("sinks", "biases", "temporal"):
            assert not grad.any(), name
    assert logits.isfinite().all()
    # One row without a sink beside one with some: as if alone.
    sequences = random_sequences(4, layout_of("per_user"), (1, 6))
    mixed, alone = rows_of(sequences), rows_of(sequences, [0])
    assert padded(mixed).sink_valid.any(1).tolist() == [False, True]
    with torch.no_grad():
        close(model(alone, objective).logits[0], model(mixed, objective).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_other_sequences_never_come_in_through_unused_slots(causal: bool) -> None:
    """The published, non-causal form lets slots without a sink take part: they are zeros, not a neighbour's states."""
    spec = tiny_spec(bias=BiasSpec(layers=1.0, gamma=3.0, causal=causal))
    model, batch = tiny_model(spec), random_batch(4, layout_of("per_target"), (2, 6))
    begin, kinds, ids = int(batch.axes["positions"].offsets[1]), batch.inputs["kinds"], batch.inputs["input_ids"].clone()
    text = (kinds == TEXT) | (kinds == FEEDBACK)
    text[:begin] = False
    ids[text] = (ids[text] + 7) % 90
    ids[begin : begin + 2] = 5
    with torch.no_grad():
        before, after = model(batch, ALL).logits, model(changed(batch, input_ids=ids), ALL).logits
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
