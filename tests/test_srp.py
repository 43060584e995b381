"""SRP4CTR: what a candidate and a hidden field may depend on, pre-training, and what a history costs its candidates."""

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
from ctrsink.config.model.srp import SrpSpec, mask_group
from ctrsink.dataset.events import Events
from ctrsink.families import srp
from ctrsink.families.registry import family_of
from ctrsink.families.srp.fields import Hidden
from ctrsink.families.srp.model import Srp
from ctrsink.sequences.batch import Batch
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
)  # fmt: skip

FORMS = [{}, {"queries": 0}, {"share_keys": False}, {"queries": 0, "share_keys": False, "layers": 1}]
sizes = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=5)


def logits(model: Srp, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        found = model(batch, CLICK).logits
    assert found is not None
    return found


def states(model: Srp, batch: Batch) -> torch.Tensor:
    """Of behaviours, with what the batch hides."""
    with torch.no_grad():
        embedded = model.embedding.behaviours(batch.inputs["signals"], batch.inputs["numbers"], model.cloze.hidden(batch))
        return model.encoder(embedded, batch.axes["behaviours"], whole=True)[0]


def with_inputs(batch: Batch, **inputs: torch.Tensor) -> Batch:
    return dataclasses.replace(batch, inputs=batch.inputs | {name.replace("_of_", "."): value for name, value in inputs.items()})


def test_fields_are_of_the_item_or_of_the_behaviour() -> None:
    of_item = {"item_id", "item_mean", "item_count", "item.year", "hashed.item.brand", "mean.item.brand", "count.item.brand"}
    of_behaviour = {"feedback", "deviation", "hour", "weekday", "previous_gap", "time_gap", "log.price", "hashed.log.slot"}
    assert {name for name in of_item | of_behaviour if mask_group(name) == "item"} == of_item
    assert spec_of().foretold == {"item": ("item_id", "hashed.item.brand"), "behaviour": ("feedback", "hour", "previous_gap")}


@pytest.mark.parametrize("group", ["item", "behaviour"])
def test_a_hidden_group_hides_all_its_fields(group: str) -> None:
    """Other values there change no state of any behaviour; the same values where they are shown do."""
    model, batch = model_of(spec_of()), batch_of([6, 4], [1, 2], spec_of())
    masked = torch.tensor([1, 7])
    batch = with_inputs(batch, masked_of_item=masked, masked_of_behaviour=masked)
    before = states(model, batch)
    names = [name for name in BEHAVIOURS if mask_group(name) == group]
    assert len(names) >= 4
    for name in names:
        place = [n for n in BEHAVIOURS if (n in model.cloze.columns) == (name in model.cloze.columns)].index(name)
        which = "signals" if name in model.cloze.columns else "numbers"
        changed = batch.inputs[which].clone()
        changed[masked, place] = (changed[masked, place] + 1) % 5
        assert torch.equal(states(model, with_inputs(batch, **{which: changed})), before), name
        shown = with_inputs(batch, **{which: changed, f"masked_of_{group}": masked[:1]})
        kept = with_inputs(batch, **{f"masked_of_{group}": masked[:1]})
        assert not torch.allclose(states(model, shown), states(model, kept)), name


def test_masks_of_the_groups_differ_and_only_they_say_what_is_hidden() -> None:
    model, batch = model_of(spec_of()), batch_of([4], [1], spec_of())
    signals, numbers = batch.inputs["signals"], batch.inputs["numbers"]
    none, all_rows = torch.zeros(0, dtype=torch.int64), torch.arange(4)
    mask = model.cloze.mask(torch.zeros_like(all_rows))
    both = model.embedding.behaviours(signals, numbers, Hidden(all_rows, all_rows, mask))
    assert torch.equal(both[0], both[1])
    item = model.embedding.behaviours(signals, numbers, Hidden(all_rows, none, mask))
    assert not torch.equal(item[0], item[1])
    shown = model.embedding.behaviours(signals, numbers, Hidden(none, none, mask[:0]))
    assert torch.equal(shown, model.embedding.behaviours(signals, numbers))


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
    """A history is read alike where a longer one stands beside it, and the order of its behaviours matters."""
    spec = spec_of()
    model, batch = model_of(spec), batch_of([4], [1], spec)
    turned = {name: batch.inputs[name].flip(0) for name in ("signals", "numbers")}
    assert not torch.allclose(logits(model, with_inputs(batch, **turned)), logits(model, batch))
    positions = model.encoder.positions.weight
    with torch.no_grad():
        before = logits(model, batch)
        positions[4:] += 1
        assert torch.equal(logits(model, batch), before)
        positions[3] += torch.randn(spec.width)
        assert not torch.equal(logits(model, batch), before)


@settings(max_examples=25)
@given(sizes, st.randoms(use_true_random=False), st.integers(-(2**63), 2**63 - 1))
def test_masks_do_not_depend_on_the_batch(requests: list[tuple[int, int]], random: object, key: int) -> None:
    lengths, asked = [list(part) for part in zip(*requests, strict=True)]
    spec = spec_of(mask_ratio=0.5, negatives=20)
    model = model_of(spec)
    sequences = sequences_of(drawn_events(lengths, asked, spec), lengths, asked, spec)
    order = np.arange(len(lengths))
    random.shuffle(order)  # pyright: ignore[reportAttributeAccessIssue]
    whole = model.drawn(collate(sequences, order, order), CLOZE, key)
    alone = [model.drawn(collate(sequences, order[i : i + 1], order[i : i + 1]), CLOZE, key) for i in range(len(order))]
    starts = whole.axes["behaviours"].offsets[:-1].tolist()
    for name in ("masked.item", "masked.behaviour"):
        parts = [one.inputs[name] + start for one, start in zip(alone, starts, strict=True)]
        assert torch.equal(whole.inputs[name], torch.cat(parts))
    assert whole.units == sum(one.units or 0 for one in alone)
    assert all(torch.equal(one.inputs["negatives"], whole.inputs["negatives"]) for one in alone)


def test_masks_are_drawn_with_their_ratio_each_group_and_key_apart() -> None:
    spec = spec_of(mask_ratio=0.3)
    model, batch = model_of(spec), batch_of([20] * 200, [1] * 200, spec)

    def drawn(key: int) -> tuple[set[int], set[int]]:
        found = model.drawn(batch, CLOZE, key)
        item, behaviour = (set(found.inputs[f"masked.{group}"].tolist()) for group in ("item", "behaviour"))
        assert found.units == len(item) + len(behaviour)
        return item, behaviour

    first, second = drawn(1), drawn(2)
    for found in (*first, *second):
        assert 0.27 < len(found) / 4000 < 0.33
    for one, other in ((first[0], first[1]), (first[0], second[0]), (first[1], second[1])):
        assert 0.07 < len(one & other) / 4000 < 0.11
    assert drawn(1) == first
    assert model.drawn(batch, CLICK, 1) is batch


def test_sequences_that_fill_the_batch_have_nothing_hidden() -> None:
    spec = spec_of(mask_ratio=0.9)
    model, rows = model_of(spec), np.array([0, 1])
    sequences = sequences_of(drawn_events([9, 9], [1, 1], spec), [9, 9], [1, 1], spec)
    batch = model.drawn(collate(sequences, rows, rows, np.array([True, False])), CLOZE, 0)
    alone = model.drawn(collate(sequences, rows[:1], rows[:1]), CLOZE, 0)
    assert batch.units == alone.units
    torch.testing.assert_close(model(batch, CLOZE).loss, model(alone, CLOZE).loss)


def test_a_group_without_categories_is_not_hidden() -> None:
    spec = spec_of(behaviours=("item_id", "deviation"), mask_ratio=0.9)
    batch = model_of(spec).drawn(batch_of([9], [1], spec), CLOZE, 0)
    assert len(batch.inputs["masked.item"])
    assert not len(batch.inputs["masked.behaviour"])


def test_cloze_learns_a_planted_pattern() -> None:
    """A user meets one item again and again, so the others tell it. What they say follows from the hour, hidden with it."""
    spec = spec_of(behaviours=("item_id", "feedback", "hour"), target=("item_id",), mask_ratio=0.3, dropout=0.0, id_dropout=0.0)
    model = model_of(spec)

    def planted(seed: int) -> Batch:
        batch = batch_of([12] * 16, [1] * 16, spec, seed)
        signals = batch.inputs["signals"].clone()
        first = signals[batch.axes["behaviours"].offsets[:-1], 0][batch.axes["behaviours"].owner]
        signals[:, 0], signals[:, 1] = first, signals[:, 2] % 5
        return model.drawn(with_inputs(batch, signals=signals), CLOZE, seed)

    optimizer = torch.optim.Adam(training_groups(model, OF_CLOZE), 0.01)
    model.train()
    for step in range(120):
        batch = planted(step)
        assert batch.units
        optimizer.zero_grad()
        (model(batch, CLOZE).loss / batch.units).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        tallies = model(planted(999), CLOZE).tallies
    shares = {name: float(tallies[f"hits/{name}"] / tallies[f"of/{name}"]) for name in ("item_id", "feedback", "hour")}
    assert shares["item_id"] > 0.9
    assert shares["feedback"] < 0.5
    assert shares["hour"] < 0.3


def test_loss_is_the_cross_entropy_of_what_is_hidden() -> None:
    spec = spec_of(rows=37)
    model = model_of(spec)
    batch = model.drawn(batch_of([9, 5], [1, 1], spec), CLOZE, 3)
    found = states(model, batch)
    expected = torch.zeros(())
    for group, names in spec.foretold.items():
        rows = batch.inputs[f"masked.{group}"]
        for name in names:
            key = name.replace("_", "__").replace(".", "_d")
            table, bias = model.embedding.table(name), model.cloze.biases[key]
            scores = model.cloze.heads[key](found[rows]) @ table.weight.T + bias.weight.T  # pyright: ignore
            truth = batch.inputs["signals"][rows, model.cloze.columns[name]]
            expected = expected + torch.nn.functional.cross_entropy(scores, truth, reduction="sum")
    torch.testing.assert_close(model(batch, CLOZE).loss, expected)


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
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in shared.cross.parameters())
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
    assert groups == set(srp.GROUPS) - set(spec.absent)
    assert spec.absent.keys() == ({"queries"} if spec.queries == 0 else set())
    names = [name for name, _ in model.named_parameters() if model.group_of(name) == "ids"]
    assert sorted(names) == ["embedding.ids.item__id.weight", "embedding.ids.user__id.weight"]
    unused = [n for n, _ in model.named_parameters() if model.trained_as(n, OF_CLOZE) is None and model.group_of(n) in OF_CLOZE]
    assert sorted(unused) == ["embedding.ids.user__id.weight", "embedding.tables.weekday.weight"]


def test_an_exported_section_builds_the_same_model() -> None:
    spec = spec_of(queries=2, share_keys=False)
    model, batch = model_of(spec, seed=4), batch_of([5, 2], [2, 2], spec)
    plain, layers = srp.merged(model, spec)
    assert layers == 0
    family = family_of("srp")
    again = family.rebuilt(plain, FACTS).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(batch, CLICK).logits, logits(model, batch))  # pyright: ignore[reportArgumentType]
    assert torch.equal(logits(model_of(spec, seed=4), batch), logits(model, batch))
    assert isinstance(spec, SrpSpec)


def counted(model: Srp, batch: Batch, objective: object) -> int:
    """FLOPs of the matrix products of a forward pass, as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch, objective)
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
