"""SRP4CTR's pre-training: what is hidden, what that may depend on, and that it can be foretold from the rest."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.config.model.srp import mask_group
from ctrsink.families.srp.fields import Hidden
from ctrsink.families.srp.model import Srp
from ctrsink.features.registry import of_kind
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.collate import collate
from tests.srp_fixtures import (
    BEHAVIOURS,
    CLICK,
    CLOZE,
    OF_CLOZE,
    batch_of,
    drawn_events,
    model_of,
    sequences_of,
    spec_of,
    training_groups,
    with_inputs,
)  # fmt: skip

sizes = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=5)


def states(model: Srp, batch: Batch) -> torch.Tensor:
    """Of behaviours, with what the batch hides."""
    with torch.no_grad():
        embedded = model.embedding.behaviours(batch.inputs["signals"], batch.inputs["numbers"], model.cloze.hidden(batch))
        return model.encoder(embedded, batch.axes["behaviours"], whole=True)[0]


def test_fields_are_of_the_item_or_of_the_behaviour() -> None:
    of_item = {"item_id", "item_mean", "item_count", "item.year", "hashed.item.brand", "mean.item.brand", "count.item.brand"}
    of_behaviour = {"feedback", "hour", "weekday", "previous_gap", "time_gap", "log.price", "hashed.log.slot", "user_res"}
    of_both = {"deviation", "expected", "field_res"}
    for group, names in (("item", of_item), ("behaviour", of_behaviour), ("both", of_both)):
        assert {name for name in of_item | of_behaviour | of_both if mask_group(name) == group} == names
    assert spec_of().foretold == {"item": ("item_id", "hashed.item.brand"), "behaviour": ("feedback", "hour", "previous_gap")}


@pytest.mark.parametrize("group", ["item", "behaviour"])
def test_a_hidden_group_hides_all_its_fields(group: str) -> None:
    """Other values there change no state of any behaviour; the same values where they are shown do."""
    model, batch = model_of(spec_of()), batch_of([6, 4], [1, 2], spec_of())
    masked = torch.tensor([1, 7])
    batch = with_inputs(batch, masked_item=masked, masked_behaviour=masked)
    before = states(model, batch)
    names = [name for name in BEHAVIOURS if mask_group(name) in (group, "both")]
    assert len(names) >= 4
    for name in names:
        place = [n for n in BEHAVIOURS if (n in model.cloze.columns) == (name in model.cloze.columns)].index(name)
        which = "signals" if name in model.cloze.columns else "numbers"
        changed = batch.inputs[which].clone()
        changed[masked, place] = (changed[masked, place] + 1) % 5
        assert torch.equal(states(model, with_inputs(batch, **{which: changed})), before), name
        hiding = ("item", "behaviour") if mask_group(name) == "both" else (group,)
        fewer = {f"masked_{each}": masked[:1] for each in hiding}
        shown, kept = (states(model, with_inputs(batch, **given, **fewer)) for given in ({which: changed}, {}))
        assert not torch.allclose(shown, kept), name


@pytest.mark.parametrize("hidden", [("item",), ("behaviour",), ("item", "behaviour")], ids="+".join)
@pytest.mark.parametrize("name", ["deviation", "expected", "field_res"])
def test_what_sets_a_behaviour_against_its_item_is_hidden_with_either(name: str, hidden: tuple[str, ...]) -> None:
    """With the item's mean the deviation would give the feedback away, and with the feedback the item."""
    spec = spec_of(behaviours=(*BEHAVIOURS, "expected", "field_res"))
    model, batch = model_of(spec), batch_of([6, 4], [1, 2], spec)
    masked, none = torch.tensor([1, 7]), torch.zeros(0, dtype=torch.int64)
    batch = with_inputs(batch, **{f"masked_{group}": masked if group in hidden else none for group in ("item", "behaviour")})
    place = of_kind(spec.behaviours, numbers=True).index(name)

    def changed(rows: torch.Tensor) -> Batch:
        numbers = batch.inputs["numbers"].clone()
        numbers[rows, place] += 3.0
        return with_inputs(batch, numbers=numbers)

    before = model(batch, CLOZE)
    after = model(changed(masked), CLOZE)
    assert torch.equal(states(model, changed(masked)), states(model, batch))
    assert torch.equal(after.loss, before.loss)
    assert all(torch.equal(after.tallies[key], value) for key, value in before.tallies.items())
    assert not torch.allclose(states(model, changed(masked + 1)), states(model, batch))
    # Shown it is read, in the task that hides nothing too.
    assert not torch.equal(model(changed(masked), CLICK).logits, model(batch, CLICK).logits)


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
    for name in ("masked_item", "masked_behaviour"):
        parts = [one.inputs[name] + start for one, start in zip(alone, starts, strict=True)]
        assert torch.equal(whole.inputs[name], torch.cat(parts))
    assert whole.units == sum(one.units or 0 for one in alone)
    assert all(torch.equal(one.inputs["negatives"], whole.inputs["negatives"]) for one in alone)


def test_masks_are_drawn_with_their_ratio_each_group_and_key_apart() -> None:
    spec = spec_of(mask_ratio=0.3)
    model, batch = model_of(spec), batch_of([20] * 200, [1] * 200, spec)

    def drawn(key: int) -> tuple[set[int], set[int]]:
        found = model.drawn(batch, CLOZE, key)
        item, behaviour = (set(found.inputs[f"masked_{group}"].tolist()) for group in ("item", "behaviour"))
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
    assert len(batch.inputs["masked_item"])
    assert not len(batch.inputs["masked_behaviour"])


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
        rows = batch.inputs[f"masked_{group}"]
        for name in names:
            key = name.replace("_", "__").replace(".", "_d")
            table, bias = model.embedding.table(name), model.cloze.biases[key]
            scores = model.cloze.heads[key](found[rows]) @ table.weight.T + bias.weight.T  # pyright: ignore
            truth = batch.inputs["signals"][rows, model.cloze.columns[name]]
            expected = expected + torch.nn.functional.cross_entropy(scores, truth, reduction="sum")
    torch.testing.assert_close(model(batch, CLOZE).loss, expected)
