"""What every family without text must show: no score knows the future or a neighbour, and short histories give numbers."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from ctrsink.config.model import DinSpec, HstuSpec, SparseSpec, SrpSpec
from ctrsink.config.model.ids import IdsSpec
from ctrsink.config.stages import Objective
from ctrsink.dataset.events import UserEvents
from ctrsink.families.din.model import Din
from ctrsink.families.parameters import set_trainable
from ctrsink.families.protocol import CTRModule
from ctrsink.families.registry import family_of
from ctrsink.sequences.batch import Batch
from tests.builders import random_chronology
from tests.ids_fixtures import FACTS, FORMS, SIGNALS, ids_batch

CLICK = Objective()
SPECS: dict[str, IdsSpec] = {
    "din": DinSpec(family="din", **SIGNALS, rows=50, width=8, attention_layers=(6,), layers=(6,)),
    "hstu": HstuSpec(family="hstu", **SIGNALS, rows=50, width=8, heads=2, blocks=2, layers=(6,)),
}
ALL_SPECS: dict[str, IdsSpec] = SPECS | {
    "sparse": SparseSpec(family="sparse", **SIGNALS, rows=50, width=8, heads=2, chunks=3, window=4, layers=(6,)),
    "srp": SrpSpec(family="srp", **SIGNALS, rows=50, width=8, heads=2, inner=16, queries=2, tower=(6,)),
}
close = torch.testing.assert_close


def model_of(name: str, seed: int = 1) -> CTRModule:
    model = family_of(name).build(SPECS[name], FACTS, seed).eval()
    # Tables that start at 0 take part, too.
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_()
    return model


def logits(model: CTRModule, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        found = model(batch, CLICK).logits
    assert found is not None
    return found


def users(count: int, events: int, seed: int = 0) -> list[UserEvents]:
    chance = np.random.default_rng(seed)
    return [random_chronology(chance, events) for _ in range(count)]


@pytest.mark.parametrize("name", SPECS)
def test_every_weight_comes_from_the_seed_and_has_a_group(name: str) -> None:
    first, again, other = (family_of(name).build(SPECS[name], FACTS, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    model = model_of(name)
    assert {model.group_of(key) for key, _ in model.named_parameters()} == set(ALL_SPECS[name].GROUPS)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("examples", FORMS)
def test_no_score_knows_anything_later(name: str, examples: str) -> None:
    """Everything at and after an event is changed but what is asked: all earlier scores stay, bit for bit."""
    model, (chronology,) = model_of(name), users(1, 9)
    batch = ids_batch(SPECS[name], examples, [chronology])
    before, numbers = logits(model, batch), batch.targets.events.tolist()
    moved = 0
    for slot, number in enumerate(numbers):
        now = np.arange(9) >= number
        changed = UserEvents(
            texts=np.where(now & (np.arange(9) != number), (chronology.texts + 1) % 5, chronology.texts),
            feedbacks=np.where(now, (chronology.feedbacks + 1) % 3, chronology.feedbacks),
            timestamps=np.where(np.arange(9) > number, chronology.timestamps + 10**7, chronology.timestamps),
            labels=np.where(now, 1 - chronology.labels, chronology.labels).astype(np.int8),
        )
        after = logits(model, ids_batch(SPECS[name], examples, [changed]))
        kept = slot + 1 if examples == "per_user" else 1
        if examples == "per_user" or slot == 0:
            assert torch.equal(after[:kept], before[:kept])
        moved += int(not torch.equal(after, before))
    assert moved or len(numbers) == 1


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("examples", FORMS)
def test_history_and_target_matter_and_neighbours_do_not(name: str, examples: str) -> None:
    model, several = model_of(name), [*users(2, 7), *users(1, 1, seed=3), *users(1, 12, seed=4)]
    together = logits(model, ids_batch(SPECS[name], examples, several))
    alone = torch.cat([logits(model, ids_batch(SPECS[name], examples, [one])) for one in several])
    close(together, alone, atol=1e-6, rtol=1e-5)
    one = several[0]
    # The newest behaviour of the first target; and what is asked.
    oldest = UserEvents(np.where(np.arange(7) == 3, (one.texts + 1) % 5, one.texts), one.feedbacks, one.timestamps, one.labels)
    asked = UserEvents(np.where(np.arange(7) == 6, (one.texts + 1) % 5, one.texts), one.feedbacks, one.timestamps, one.labels)
    for changed in (oldest, asked):
        assert not torch.equal(logits(model, ids_batch(SPECS[name], examples, [changed])), together[: len(alone)][:3])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_any_history_scores_and_gradients_are_numbers(name: str, precision: str) -> None:
    model = family_of(name).build(SPECS[name], FACTS, 1, precision)
    set_trainable(model, ALL_SPECS[name].GROUPS)
    batch = ids_batch(SPECS[name], "per_target", users(3, 1))
    out = model(batch, CLICK)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert out.logits is not None
    assert out.logits.isfinite().all()
    # Under ZeRO every parameter of every rank has a gradient, whatever its batch holds.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ALL_SPECS)
def test_logits_are_not_rounded_to_bfloat16(name: str) -> None:
    """Two impressions in a thousand would have the same score, and AUC would lose what they differ in."""
    exact, narrow = (family_of(name).build(ALL_SPECS[name], FACTS, 1, precision).eval() for precision in ("fp32", "bf16"))
    batch = ids_batch(ALL_SPECS[name], "per_request", users(8, 9))
    found = logits(narrow, batch)
    assert found.dtype == torch.float32
    assert (found != found.bfloat16().float()).float().mean() > 0.9
    assert not torch.equal(found, logits(exact, batch))
    close(found, logits(exact, batch), atol=0.05, rtol=0.05)


def with_item(batch: Batch, side: str, value: int) -> Batch:
    """With another item in place of each event's own."""
    signals = batch.inputs[side].clone()
    signals[:, 0] = value  # the first signal of both sides
    return dataclasses.replace(batch, inputs=batch.inputs | {side: signals})


def trained(name: str, spec: IdsSpec) -> tuple[Any, set[int]]:
    """A model after a few steps, in evaluation mode, and the rows of item_id that some batch of it held."""
    model = family_of(name).build(spec, FACTS, 3)
    set_trainable(model, tuple(group for group in ALL_SPECS[name].GROUPS if group != "cloze"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    held: set[int] = set()
    for step in range(4):
        batch = ids_batch(spec, "per_target", users(16, 7, seed=step))
        held |= {value for side in ("signals", "target_signals") for value in batch.inputs[side][:, 0].tolist()}
        optimizer.zero_grad()
        model(batch, CLICK).loss.backward()
        optimizer.step()
    return model.eval(), held


@pytest.mark.parametrize("name", ALL_SPECS)
def test_an_id_that_no_batch_held_scores_as_the_unknown_in_the_run_and_exported(name: str) -> None:
    spec, family = ALL_SPECS[name], family_of(name)
    model, held = trained(name, spec)
    batch = ids_batch(spec, "per_target", users(6, 7, seed=99))
    never = sorted(set(range(1, spec.rows)) - held)[::5]
    assert len(held) == 5
    asked = {
        (side, value): with_item(batch, side, value) for side in ("signals", "target_signals") for value in (0, *never, *held)
    }
    found = {key: logits(model, given) for key, given in asked.items()}
    for (side, value), score in found.items():
        assert torch.equal(score, found[side, 0]) == (value == 0 or value in never), (side, value)
    # In training it has a row of its own, which may learn.
    table = model.embedding.table("item_id").weight
    assert not torch.equal(table[never[0]], table[0])
    plain = family.merged(model, spec).section
    again = family.rebuilt(plain, FACTS).eval()
    again.load_state_dict(model.state_dict())
    for exported in (model, again):
        for key, given in asked.items():
            assert torch.equal(logits(exported, given), found[key]), key


@pytest.mark.parametrize("name", ALL_SPECS)
def test_where_training_hid_no_id_each_scores_by_its_own_row(name: str) -> None:
    """The row of the unknown was not trained, either, so that nothing speaks for it."""
    spec, family = ALL_SPECS[name].model_copy(update={"id_dropout": 0.0}), family_of(name)
    model, held = trained(name, spec)
    assert 0 not in held
    batch = ids_batch(spec, "per_target", users(6, 7, seed=99))
    never = [value for value in range(1, spec.rows) if value not in held][:2]
    asked = [with_item(batch, side, value) for side in ("signals", "target_signals") for value in (0, *never)]
    found = [logits(model, given) for given in asked]
    assert not any(torch.equal(one, other) for place, one in enumerate(found) for other in found[:place])
    plain = family.merged(model, spec).section
    again = family.rebuilt(plain, FACTS).eval()
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(logits(again, given), score) for given, score in zip(asked, found, strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_a_sequence_that_only_fills_the_batch_counts_nothing(name: str) -> None:
    model, batch = model_of(name), ids_batch(SPECS[name], "per_user", users(2, 6))
    counted = batch.targets.counted.clone()
    counted[3:] = False
    half = dataclasses.replace(batch, targets=dataclasses.replace(batch.targets, counted=counted))
    found = logits(model, half)
    expected = functional.binary_cross_entropy_with_logits(found[:3], batch.targets.labels[:3], reduction="sum")
    with torch.no_grad():
        close(model(half, CLICK).loss, expected)


def test_din_is_the_plain_loop() -> None:
    model: Any = model_of("din")
    assert isinstance(model, Din)
    batch = ids_batch(SPECS["din"], "per_user", users(2, 8))
    read, found = batch.inputs, logits(model, batch)
    with torch.no_grad():
        behaviours = model.embedding.behaviours(read["signals"], read["numbers"])
        asked = model.embedding.targets(read["target_signals"], read["target_numbers"])
        for t in range(len(asked)):
            begin = int(batch.axes["behaviours"].offsets[int(batch.axes["targets"].owner[t])])
            interest = torch.zeros(8)
            for k in range(begin, begin + int(read["seen"][t])):
                a, b = asked[t], behaviours[k]
                first = model.weigh.target(a) + model.weigh.behaviour(b) + model.weigh.product(a * b)
                interest += model.weigh.inner(functional.gelu(first)) * b
            interest /= max(1, int(read["seen"][t])) ** 0.5
            expected = model.head(torch.cat([interest, asked[t], interest * asked[t], read["target_numbers"][t]]))
            close(found[t], expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_what_can_be_learned_is_learned(name: str) -> None:
    """The label is whether the item is in the history: neither side alone knows it."""
    spec = SPECS[name].model_copy(update={"width": 16, "id_dropout": 0.0, "dropout": 0.0})
    model = family_of(name).build(spec, FACTS, 0)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    chance = np.random.default_rng(0)
    losses = []
    for _ in range(120):
        several = [random_chronology(chance, 3) for _ in range(32)]
        for one in several:
            one.labels[2] = one.texts[2] in one.texts[:2]
        batch = ids_batch(spec, "per_target", several)
        loss = model(batch, CLICK).loss / batch.impressions
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])


@pytest.mark.parametrize(("given", "found"), [(None, 0.25), (0.02, 0.02)])
def test_tables_begin_as_wide_as_they_are_told(given: float | None, found: float) -> None:
    spec = DinSpec(family="din", embedding_size=16, embedding_std=given, rows=2000, **SIGNALS)
    weight = family_of("din").build(spec, FACTS, 0).embedding.table("item_id").weight
    assert weight.std().item() == pytest.approx(found, rel=0.02)
