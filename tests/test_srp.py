"""SRP4CTR: what a candidate may depend on, what a stage trains, and what a history costs its candidates."""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import srp_folded
from ctrsink.config.model.srp import SrpSpec
from ctrsink.dataset.events import Events
from ctrsink.families.registry import family_of
from ctrsink.families.srp.attention import Attend, Remember
from ctrsink.families.srp.family import FAMILY
from ctrsink.families.srp.fields import Hidden
from ctrsink.families.srp.model import Srp
from ctrsink.sequences.batch import Axis, Batch
from ctrsink.sequences.collate import collate
from tests.srp_fixtures import (
    BEHAVIOURS,
    CLICK,
    CLOZE,
    FACTS,
    OF_CLICK,
    OF_CLOZE,
    batch_of,
    drawn_events,
    model_of,
    sequences_of,
    spec_of,
    training_groups,
    with_inputs,
)  # fmt: skip

FORMS = [{}, {"queries": 0}, {"share_keys": False}, {"queries": 0, "share_keys": False, "layers": 1}]
OF_TARGETS = ["embedding.ids.user__id.weight", "embedding.tables.weekday.weight"]
"""Tables that no behaviour reads."""
sizes = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=5)


def logits(model: Srp, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        found = model(batch, CLICK).logits
    assert found is not None
    return found


def of_candidate(row: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Events], Events]:
    """All that is known of one event, changed."""

    def changed(events: Events) -> Events:
        def other(values: np.ndarray) -> np.ndarray:
            out = values.copy()
            out[row] = change(out[row])
            return out

        assert events.target_numbers is not None
        categories = {name: other(values) for name, values in events.categories.items()}
        return dataclasses.replace(events, categories=categories, target_numbers=other(events.target_numbers))

    return changed


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_candidates_do_not_see_one_another(form: dict[str, int]) -> None:
    """Bit for bit where one is another; and each alone as among all."""
    spec = spec_of(**form)
    model, lengths, asked = model_of(spec), [5, 0, 8], [3, 2, 1]
    found = logits(model, batch_of(lengths, asked, spec))
    other = logits(model, batch_of(lengths, asked, spec, changed=of_candidate(6, lambda value: (value + 1) % 7)))
    same = torch.tensor([True, False, True, True, True, True])
    assert torch.equal(found[same], other[same])
    assert found[1] != other[1]
    everything = batch_of(lengths, asked, spec, folded=False)
    assert everything.axes["behaviours"].total == 5 * 3 + 8
    torch.testing.assert_close(found, logits(model, everything), rtol=0, atol=1e-5)


@settings(max_examples=15)
@given(sizes)
def test_folded_requests_score_as_unfolded_and_alone(requests: list[tuple[int, int]]) -> None:
    lengths, asked = [list(part) for part in zip(*requests, strict=True)]
    model, spec = model_of(spec_of()), spec_of()
    found = logits(model, batch_of(lengths, asked, spec))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, logits(model, batch_of(lengths, asked, spec, folded=False)), rtol=0, atol=1e-5)
    sequences = sequences_of(drawn_events(lengths, asked, spec), lengths, asked, spec)
    alone = [logits(model, collate(sequences, np.array([row]), np.array([row]))) for row in range(len(lengths))]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-5)


def test_a_candidate_sees_every_behaviour_and_its_own_signals() -> None:
    spec = spec_of()
    model = model_of(spec)
    batch = batch_of([4], [1], spec)
    found = logits(model, batch)
    for name, rows in (("signals", 4), ("numbers", 4), ("target_signals", 1), ("target_numbers", 1)):
        for row in range(rows):
            for column in range(batch.inputs[name].shape[1]):
                changed = batch.inputs[name].clone()
                changed[row, column] = (changed[row, column] + 1) % 5
                assert not torch.equal(logits(model, with_inputs(batch, **{name: changed})), found), (name, row, column)


def test_positions_count_from_the_latest_behaviour() -> None:
    spec = spec_of()
    model, batch = model_of(spec), batch_of([4], [1], spec)
    turned = {name: batch.inputs[name].flip(0) for name in ("signals", "numbers")}
    assert not torch.allclose(logits(model, with_inputs(batch, **turned)), logits(model, batch))
    asked: list[torch.Tensor] = []
    model.encoder.positions.register_forward_pre_hook(lambda module, given: asked.append(given[0]))
    logits(model, batch_of([3, 0, 2], [1, 1, 1], spec))
    assert [found.tolist() for found in asked] == [[2, 1, 0, 1, 0]]


def test_attention_may_take_nothing() -> None:
    """Beside the rows of a sequence stands a key of zeros: what is far from a query is not taken for lack of something nearer."""
    remember, attend = Remember(4, 1), Attend(4, 1, 0.0).eval()
    for module in (remember.key, remember.value, attend.query, attend.out):
        torch.nn.init.eye_(module.weight)
        torch.nn.init.zeros_(module.bias)
    row, one, none = torch.tensor([[50.0, 0, 0, 0]]), Axis.of(np.array([1, 0])), torch.zeros(1, 4)
    memory = remember(row, one)
    queries = Axis.of(np.array([3, 1]))
    found = attend(torch.cat([row, -row, none, row]), memory, queries)
    torch.testing.assert_close(found, torch.cat([row, none, row / 2, none]))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("lengths", [[0, 0], [0, 3]], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_empty_histories_are_finite_and_every_trained_parameter_has_a_gradient(
    form: dict[str, int], lengths: list[int], precision: str
) -> None:
    spec = spec_of(**form, mask_ratio=0.5)
    model = model_of(spec, precision=precision).train()
    if precision == "fp64":
        model.double()
    batch = model.drawn(batch_of(lengths, [1, 2], spec), CLOZE, 0)
    for objective, groups in ((CLOZE, OF_CLOZE), (CLICK, tuple(g for g in OF_CLICK if g not in spec.absent))):
        trained = training_groups(model, groups)
        out = model(batch, objective)
        out.loss.backward()
        assert torch.isfinite(out.loss)
        assert [p.shape for p in trained if p.grad is None or not torch.isfinite(p.grad).all()] == []


def test_bf16_products_are_close_to_fp32() -> None:
    spec = spec_of()
    batch = model_of(spec).drawn(batch_of([9, 0, 4], [2, 1, 3], spec), CLOZE, 0)
    exact, narrow = model_of(spec), model_of(spec, precision="bf16")
    found = logits(narrow, batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits(exact, batch), rtol=0, atol=0.03)
    torch.testing.assert_close(narrow(batch, CLOZE).loss, exact(batch, CLOZE).loss, rtol=0.02, atol=0)


def test_shared_keys_are_the_encoders_own() -> None:
    shared, own = model_of(spec_of()), model_of(spec_of(share_keys=False))
    more = sum(p.numel() for p in own.parameters()) - sum(p.numel() for p in shared.parameters())
    assert more == 2 * 2 * (16 * 16 + 16)
    batch = batch_of([5], [2], spec_of())
    trained = training_groups(shared, ("cross",))
    shared(batch, CLICK).loss.backward()
    of_targets = 40 * 8 + 7 * 8
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in shared.cross.parameters()) + of_targets
    key = shared.encoder.blocks[-1].remember.key.weight  # pyright: ignore
    training_groups(shared, ("encoder",))
    shared(batch, CLICK).loss.backward()
    assert key.grad.abs().sum() > 0  # pyright: ignore


def test_inputs_of_candidates_are_the_behaviours_own() -> None:
    """Their item goes through the same table and projection; a field that targets lack is unknown."""
    spec = spec_of()
    model, batch = model_of(spec), batch_of([1], [1], spec)
    names = list(model.cloze.columns)
    signals, numbers = torch.zeros(1, len(names), dtype=torch.int64), torch.zeros(1, 3)
    signals[0, names.index("item_id")] = batch.inputs["target_signals"][0, 0]
    numbers[0, 0] = batch.inputs["target_numbers"][0, 0]
    nothing = torch.zeros(0, dtype=torch.int64)
    hidden = Hidden(nothing, torch.zeros(1, dtype=torch.int64), torch.zeros(0, spec.width))
    items, beside = model.embedding.candidates(batch.inputs["target_signals"], batch.inputs["target_numbers"])
    torch.testing.assert_close(items, model.embedding.behaviours(signals, numbers, hidden))
    assert beside.shape == (1, spec.embedding_size + 1)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_groups_cover_all_parameters(form: dict[str, int]) -> None:
    model, spec = model_of(spec_of(**form)), spec_of(**form)
    groups = {model.group_of(name) for name, _ in model.named_parameters()}
    assert groups == set(spec.GROUPS) - set(spec.absent)
    assert spec.absent.keys() == ({"queries"} if spec.queries == 0 else set())
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if model.group_of(name) == "ids"] == ["embedding.ids.item__id.weight"]
    beside = [name for name in names if model.group_of(name) == "cross" and not name.startswith("cross.")]
    assert sorted(beside) == OF_TARGETS
    assert [n for n in names if model.trained_as(n, OF_CLOZE) is None and model.group_of(n) in OF_CLOZE] == []
    assert not any(model.decays(name, 2) for name in beside)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_tables_that_targets_alone_have_learn_where_all_pre_training_is_frozen(form: dict[str, int]) -> None:
    spec = spec_of(**form, id_dropout=0.0)
    model = model_of(spec).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = tuple(group for group in ("cross", "queries", "tower") if group not in spec.absent)
    optimizer = torch.optim.Adam(training_groups(model, groups), 0.01)
    model(batch_of([5, 3], [2, 2], spec), CLICK).loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in moved if name.startswith("embedding.")} == set(OF_TARGETS)
    assert {model.group_of(name) for name in moved} == set(groups)


def test_an_exported_section_builds_the_same_model() -> None:
    spec = spec_of(queries=2, share_keys=False)
    model, batch = model_of(spec, seed=4), batch_of([5, 2], [2, 2], spec)
    plain, _, layers = FAMILY.merged(model, spec)
    assert layers == 0
    family = family_of("srp")
    again = family.rebuilt(plain, FACTS).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(batch, CLICK).logits, logits(model, batch))  # pyright: ignore[reportArgumentType]
    assert torch.equal(logits(model_of(spec, seed=4), batch), logits(model, batch))
    assert isinstance(spec, SrpSpec)


def counted(model: Callable[..., object], *given: object) -> int:
    """FLOPs of the matrix products of a forward pass, as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*given)
    operations = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in operations.items() if "attention" not in str(operation))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_flops_are_those_of_the_products(form: dict[str, int]) -> None:
    spec = spec_of(**form)
    model = model_of(spec).train()
    batch = model.drawn(batch_of([9, 4, 0], [5, 1, 2], spec), CLOZE, 0)
    training_groups(model, ())
    for objective in (CLICK, CLOZE):
        assert model.flop_count(objective)(batch).matrices == counted(model, batch, objective)
    forward = model.flop_count(CLICK)(batch)
    training_groups(model, OF_CLICK)
    assert model.flop_count(CLICK)(batch).total == 3 * forward.total
    training_groups(model, ("tower",))
    assert forward.total < model.flop_count(CLICK)(batch).total < 2 * forward.total
    assert model.flop_count(CLICK)(batch).attention == forward.attention


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("behaviours", [BEHAVIOURS, ("item_id", "feedback"), (*BEHAVIOURS, "expected")], ids=len)
def test_a_frozen_encoder_is_not_gone_back_through(form: dict[str, int], behaviours: tuple[str, ...]) -> None:
    """Tables of targets are trained beside it, and nothing that behaviours are embedded by."""
    spec = spec_of(**form, behaviours=behaviours)
    model, batch = model_of(spec), batch_of([9, 4, 0], [5, 1, 2], spec)
    of = batch.inputs

    def below() -> None:
        embedded = model.embedding.behaviours(of["signals"], of["numbers"])
        model.encoder(embedded, batch.axes["behaviours"], model.queries is not None)
        model.embedding.candidates(of["target_signals"], of["target_numbers"])

    training_groups(model, ())
    forward, frozen = model.flop_count(CLICK)(batch), counted(below)
    assert forward.matrices == counted(model, batch, CLICK)
    training_groups(model, ("cross", "queries", "tower"))
    assert model.flop_count(CLICK)(batch).matrices == 3 * forward.matrices - 2 * frozen


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_forward_pass_reads_nothing_back_from_the_device(form: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device `meta`, which holds no values: all sizes are known on the host."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: contextlib.nullcontext())
    spec = spec_of(**form, negatives=20)
    model = model_of(spec).train()
    batch = model.drawn(batch_of([3, 0, 7], [2, 1, 3], spec), CLOZE, 0).to("meta")
    model.to("meta")
    assert model(batch, CLICK).logits.shape == (6,)
    for training in (True, False):
        assert model.train(training)(batch, CLOZE).loss.shape == ()


def test_more_candidates_do_not_run_the_encoder_again() -> None:
    spec = spec_of()
    model = model_of(spec)
    training_groups(model, ())
    one, many, apart = (
        counted(model, batch_of([20], [count], spec, folded=folded), CLICK)
        for count, folded in ((1, True), (50, True), (50, False))
    )
    assert many < 10 * one
    assert apart == 50 * one


def test_the_benchmark_tells_what_folding_saves() -> None:
    given = {"history": 30, "candidates": [1, 9], "requests": 2, "precision": "fp32", "device": "cpu", "threads": 1}
    report = srp_folded.run(argparse.Namespace(**given, warmup=0, passes=1))
    ratios = {(row["contestant"], row["candidates"]): row["flops_to_folded"] for row in report["passes"]}
    assert ratios["srp, unfolded", 1] == ratios["srp, folded", 9] == 1
    assert 6 < ratios["srp, unfolded", 9] < 9
    assert "| srp, unfolded |" in srp_folded.text(report)
