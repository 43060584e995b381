"""The family `sparse` (SparseCTR): equal to its definition, key by key, and no score knows what comes later."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ctrsink.families.registry import family_of
from ctrsink.families.sparse.model import Sparse, keys_read
from ctrsink.families.sparse.rows import QUERIES, blocks_of
from ctrsink.families.sparse.sight import sight
from ctrsink.features.ragged import Ragged
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.chunks import Chunks, by_length, by_time
from tests.sparse_fixtures import (
    CLICK,
    FACTS,
    User,
    a_batch,
    a_model,
    a_user,
    changed_after,
    dense_logits,
    plain_chunks,
    tiny_layout,
    tiny_spec,
)

GAPS = st.lists(st.sampled_from([0, 0, 1, 60, 3600, 86400, 500_000]), max_size=70)
ABLATIONS = [
    {},
    {"chunking": "equal"},
    {"time_bias": False},
    {"branches": ["global"]},
    {"branches": ["transition"], "transition": 3},
    {"branches": ["local", "global"], "window": 1},
    {"chunks": 1},
    {"chunks": 2, "window": 100},
    {"heads": 1, "blocks": 1},
]


def some_users() -> list[User]:
    draw = np.random.default_rng(0)
    return [
        a_user(draw.integers(0, 200_000, 79).tolist(), range(20, 80, 3), 1),
        a_user([], [0], 2),
        a_user([5, 5, 5, 0, 0], [5], 3),
        a_user(draw.integers(0, 3, 60).tolist(), [57, 58, 59, 60], 4, request=True),
        a_user(np.arange(50).tolist(), [50], 5),  # every gap is the largest so far
    ]


def logits(model: Sparse, users: Sequence[User], examples: str = "per_user") -> torch.Tensor:
    with torch.no_grad():
        return model.logits(a_batch(users, tiny_layout(model.spec, examples)), CLICK)


def loss_and_gradients(model: Sparse, found: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (found * (torch.arange(len(found)) + 1)).sum().backward()
    own = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return own | {"logits": found.detach()}


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_scores_and_gradients_are_those_of_the_definition(changes: dict[str, object]) -> None:
    spec = tiny_spec(**changes)
    batch = a_batch(some_users(), tiny_layout(spec))
    # In fp32 the gradient of a coefficient is a sum of many terms that cancel; in fp64 nothing hides behind that.
    for double, tolerance in ((True, 1e-9), (False, 3e-5)):
        model = a_model(spec, double=double)
        ours = loss_and_gradients(model, model.logits(batch, CLICK), batch)
        plain = loss_and_gradients(model, dense_logits(model, batch), batch)
        for name, values in plain.items():
            assert (ours[name] - values).abs().max() <= tolerance * max(1, values.abs().max()), name


@given(GAPS, st.integers(1, 6), st.sampled_from(["time", "equal"]))
def test_every_beginning_is_divided_as_it_would_be_alone(gaps: list[int], most: int, chunking: str) -> None:
    times = np.append(0, np.cumsum(gaps, dtype=np.int64))
    chunks, spec = chunked(times, most, chunking), tiny_spec(chunks=most, chunking=chunking)
    for seen in range(1, len(times) + 1):
        alive = (chunks.born <= seen) & (seen < chunks.died)
        found = sorted([*zip(chunks.starts[alive], chunks.ends[alive], strict=True), (chunks.running[seen], seen)])
        assert found == [(chunk.start, chunk.stop) for chunk in plain_chunks(times[:seen].tolist(), spec)]
        assert len(found) <= most


@given(GAPS, st.integers(1, 6), st.sampled_from(["time", "equal"]), st.booleans())
def test_blocks_hold_all_rows_once_and_every_chunk_that_they_see(
    gaps: list[int], most: int, chunking: str, growing: bool
) -> None:
    times = np.cumsum(np.arange(len(gaps) + 1) if growing else np.append(0, gaps))
    chunks, seen = chunked(times, most, chunking), np.arange(len(times) + 1)
    blocks = blocks_of(seen, chunks, most)
    assert np.array_equal(np.concatenate([np.arange(first, first + count) for first, count in blocks[:, :2]]), seen)
    assert blocks[:, 1].max() <= QUERIES
    # At worst two chunks are born with a row: the work is linear in the rows whatever the gaps are.
    assert len(blocks) <= 2 + len(seen) * max(1 / QUERIES, 4 / (most + 1))
    for first, count, *own in blocks:
        for row in seen[first : first + count]:
            assert set(np.flatnonzero((chunks.born <= row) & (row < chunks.died))) <= set(own)


def chunked(times: np.ndarray, most: int, chunking: str) -> Chunks:
    return by_time(times, most) if chunking == "time" else by_length(len(times), most)


@settings(deadline=None, max_examples=60)
@given(GAPS.filter(lambda gaps: len(gaps) >= 3), st.data(), st.sampled_from(["time", "equal"]))
def test_no_per_user_score_knows_a_later_event(gaps: list[int], data: st.DataObject, chunking: str) -> None:
    event = data.draw(st.integers(2, len(gaps)))
    targets = sorted(data.draw(st.sets(st.integers(0, len(gaps)), min_size=1)) | {event - 1})
    user, model = a_user(gaps, targets), a_model(tiny_spec(chunking=chunking))
    earlier = sum(target < event for target in targets)
    before, after = logits(model, [user]), logits(model, [changed_after(user, event, data.draw(st.integers(0, 9)))])
    assert torch.equal(before[:earlier], after[:earlier])


def test_later_events_do_change_later_scores() -> None:
    user, model = some_users()[0], a_model(tiny_spec())
    assert (logits(model, [user]) != logits(model, [changed_after(user, 50, 0)])).sum() == 10


@pytest.mark.parametrize("examples", ["per_target", "per_request"])
@pytest.mark.parametrize("length", [3, 30, 80])
def test_no_score_of_a_request_knows_answers_or_what_comes_later(examples: str, length: int) -> None:
    draw, model = np.random.default_rng(length), a_model(tiny_spec())
    gaps = [*draw.integers(0, 100_000, length).tolist(), 0, 0, 10, 20]
    asked = [length] if examples == "per_target" else [length, length + 1, length + 2]
    user = a_user(gaps, asked, request=True)
    found = logits(model, [user], examples)
    assert torch.equal(found, logits(model, [changed_after(user, asked[-1] + 1, 1)], examples))
    e = user.events
    told = {**e.categories, "feedback": np.where(np.arange(length + 5) >= length, 0, e.categories["feedback"])}
    answered = User(replace(e, labels=(1 - e.labels).astype(np.int8), categories=told), user.targets)
    assert torch.equal(found, logits(model, [answered], examples))


def test_a_candidate_does_not_depend_on_the_others() -> None:
    user, model = a_user([7, 86400] * 20 + [0] * 5, range(35, 46), request=True), a_model(tiny_spec())
    items = user.events.categories["item_id"].copy()
    items[38:] = items[38:] % 19 + 1
    other = User(replace(user.events, categories={**user.events.categories, "item_id": items}), user.targets)
    one, two = logits(model, [user], "per_request"), logits(model, [other], "per_request")
    assert torch.equal(one[:3], two[:3])
    assert (one[3:] != two[3:]).all()


def test_a_target_has_one_score_in_all_forms() -> None:
    user, model = some_users()[0], a_model(tiny_spec())
    numbers = user.events.target_numbers
    assert numbers is not None
    numbers[:, 1] = 0.5  # what the profile is told, which is that of the sequence's first target
    together = logits(model, [user])
    alone = logits(model, [User(user.events, user.targets[i : i + 1]) for i in range(len(user.targets))], "per_target")
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_a_sequence_does_not_depend_on_those_beside_it() -> None:
    users, model = some_users(), a_model(tiny_spec())
    alone = torch.cat([logits(model, [user]) for user in users])
    torch.testing.assert_close(logits(model, users), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_nothing_seen_is_no_trouble(changes: dict[str, object], bf16: bool) -> None:
    model = a_model(tiny_spec(**changes)).train()
    model.mixed_precision = bf16
    for users in ([a_user([], [0]), a_user([], [0], 1)], [a_user([], [0]), a_user([3] * 30, [30])]):
        batch = a_batch(users, tiny_layout(model.spec))
        model.zero_grad()
        out = model(batch, CLICK)
        out.loss.backward()
        assert torch.isfinite(out.logits).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_bf16_is_near() -> None:
    model, batch = a_model(tiny_spec()), a_batch(some_users(), tiny_layout(tiny_spec()))
    exact = model(batch, CLICK).logits
    model.mixed_precision = True
    torch.testing.assert_close(model(batch, CLICK).logits, exact, rtol=0.03, atol=0.03)


def test_a_window_is_cut_where_the_history_begins() -> None:
    user, model = a_user([10, 50_000, 3] * 20, [60]), a_model(tiny_spec())
    cut = a_batch([user], tiny_layout(model.spec, "per_target", history=25))
    e = user.events
    names = ("texts", "feedbacks", "timestamps", "labels", "numbers", "target_numbers")
    short = replace(
        e,
        **{name: getattr(e, name)[35:] for name in names},
        known=np.arange(26),
        categories={name: column[35:] for name, column in e.categories.items()},
    )
    whole = a_batch([User(short, np.array([25]))], tiny_layout(model.spec, "per_target"))
    whole.inputs["signals"][0] = cut.inputs["signals"][0]  # the oldest knows the gap before it
    with torch.no_grad():
        torch.testing.assert_close(model.logits(cut, CLICK), model.logits(whole, CLICK))


def test_keys_read_are_those_that_are_seen() -> None:
    spec = tiny_spec(branches=["global", "local"])
    users = [a_user([100, 7, 86400] * 20, [60], 1), a_user([], [0], 2), a_user([9, 9], [2], 3)]
    batch = a_batch(users, tiny_layout(spec, "per_target"))
    seen, count = sight(batch, spec), 0
    for branch in seen.branches.values():
        asked = torch.nn.functional.pad(seen.queries.seen, (0, 1), value=-1)[seen.queries.rows][:, :, None]
        count += int(((asked >= branch.since[:, None]) & (asked < branch.until[:, None])).sum() + branch.shown.sum())
    assert keys_read(batch, spec) == count


def test_flops_grow_with_the_length() -> None:
    model = a_model(tiny_spec())
    count = model.flop_count(CLICK)
    short, long = (count(a_batch([a_user([5] * n, [n])], tiny_layout(model.spec))).attention for n in (500, 1000))
    assert 1.9 < long / short < 2.1


def test_one_model_of_one_seed_from_its_section_alone() -> None:
    family, spec = family_of("sparse"), tiny_spec()
    one, two = family.build(spec, FACTS, 3), family.build(spec, FACTS, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    plain = family.merged(one, spec).section
    again = family.rebuilt(plain, FACTS)
    again.load_state_dict(one.state_dict())
    batch = a_batch(some_users(), tiny_layout(spec))
    assert torch.equal(again.eval()(batch, CLICK).logits, one.eval()(batch, CLICK).logits)
    assert {one.group_of(name) for name, _ in one.named_parameters()} == set(spec.GROUPS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": []}, "at least one of global, transition and local"),
        ({"branches": ["local", "local"]}, "each once"),
        ({"width": 10, "heads": 4}, "width 10 is no multiple of heads 4"),
        ({"chunks": 0}, "chunks"),
    ],
)
def test_a_section_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_spec(**changes)


def test_the_hour_and_the_weekend_are_local() -> None:
    spec = tiny_spec()
    layout = replace(tiny_layout(spec), utc_offset_hours=5.5)
    users = [a_user([86_400] * 9, [9])]
    moved = a_batch(users, layout).inputs["row_times"] - a_batch(users, tiny_layout(spec)).inputs["row_times"]
    assert set(moved.tolist()) == {19_800}


def test_a_batch_takes_its_parts_in_any_order() -> None:
    users = some_users()
    batch = a_batch(users[::-1], tiny_layout(tiny_spec()))
    rows = torch.cat([batch.inputs["behaviour_rows"], batch.inputs["target_rows"]])
    assert torch.equal(rows.sort().values, torch.arange(batch.axes["rows"].total))
    assert Ragged.of([user.targets for user in users]).offsets[-1] == len(batch.targets.labels)
