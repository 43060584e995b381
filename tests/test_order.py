"""The canonical order: what every rank, worker count and restart must agree on."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrsink.features.mix64 import mix64
from ctrsink.stream.budget import fill
from ctrsink.stream.order import Order, deal, dealt_in_rows, shuffled
from ctrsink.stream.price import Price

PINNED = [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1, 0x1FDD7128F310C389]
PINNED_KEYS = [0x050CA5B836845D32, 0xE7D99AD10F09A79B, 0xE8E009F71ABD7C08]

per_shards = st.lists(st.integers(0, 7), min_size=1, max_size=9).map(tuple).filter(any)
seeds = st.integers(0, 2**63)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    return Order(draw(per_shards), draw(st.none() | seeds), draw(st.integers(1, 4)))


@given(orders(), st.integers(0, 5))
def test_an_epoch_is_a_permutation(order: Order, epoch: int) -> None:
    ids = order.ids(epoch * order.total, order.total)
    assert ids.dtype == np.int64
    assert sorted(ids.tolist()) == list(range(order.total))


@given(orders(), st.integers(0, 60), st.lists(st.integers(0, 12), max_size=8))
def test_ids_do_not_depend_on_how_the_stream_is_cut(order: Order, start: int, cuts: list[int]) -> None:
    parts, position = [], start
    for count in cuts:
        parts.append(order.ids(position, count))
        assert len(parts[-1]) == count
        position += count
    whole = order.ids(start, sum(cuts))
    assert np.concatenate([np.empty(0, np.int64), *parts]).tolist() == whole.tolist()


@given(per_shards, seeds, st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_depends_on_seed_and_epoch_alone(per_shard: tuple[int, ...], seed: int, block: int, epoch: int) -> None:
    first, second = Order(per_shard, seed, block), Order(per_shard, seed, block)
    total = first.total
    second.ids(0, 3)  # what was asked before does not matter
    assert first.ids(epoch * total, total).tolist() == second.ids(epoch * total, total).tolist()


def test_seeds_and_epochs_differ() -> None:
    sizes = (30, 30, 30)
    runs = {tuple(Order(sizes, seed, 2).ids(90 * epoch, 90).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(runs) == 16


@given(per_shards, st.integers(1, 4), st.integers(0, 3))
def test_without_a_seed_the_order_is_natural_in_every_epoch(per_shard: tuple[int, ...], block: int, epoch: int) -> None:
    order = Order(per_shard, None, block)
    assert order.ids(epoch * order.total, order.total).tolist() == list(range(order.total))


@given(per_shards, seeds, st.integers(1, 4), st.integers(0, 3))
def test_a_block_holds_few_shards_and_every_shard_lies_in_one_block(
    per_shard: tuple[int, ...], seed: int, size: int, epoch: int
) -> None:
    order = Order(per_shard, seed, size)
    owner = np.repeat(np.arange(len(per_shard)), per_shard)
    shards = owner[order.ids(epoch * order.total, order.total)].tolist()
    # A reader that drops a shard at its last sequence never holds more than a block.
    held = [len({s for s in shards[: i + 1] if s in shards[i:]}) for i in range(len(shards))]
    assert max(held) <= size


def test_sequences_of_a_block_are_mixed() -> None:
    ids = Order((50, 50, 50, 50), 3, 2).ids(0, 200)
    first_block = ids[:100] // 50
    assert len(set(first_block.tolist())) == 2
    assert 20 < np.count_nonzero(np.diff(first_block)) < 80
    assert not (np.diff(ids[:100]) > 0).all()


def test_shuffled_is_a_permutation_that_depends_on_its_keys() -> None:
    values = np.arange(100, 160)
    assert sorted(shuffled(values, 1, 2)) == values.tolist()
    assert shuffled(values, 1, 2).tolist() != shuffled(values, 2, 1).tolist()


def test_mix64_has_fixed_values() -> None:
    """Pinned: another value would change the order of every run, and a checkpoint's position would mean something else."""
    values = np.array([0, 1, 2**40])
    assert mix64(values, 7, 3).tolist() == PINNED_KEYS
    assert mix64(values).tolist() == PINNED
    assert mix64(values, -1).tolist() == mix64(values, 2**64 - 1).tolist()


@st.composite
def dealings(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    world, accumulation, micro = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    count = world * accumulation * micro
    return np.array(draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))), world, accumulation


def priced(lengths: np.ndarray, pairs: float = 0.05) -> np.ndarray:
    return Price(pairs).of(lengths)


@given(dealings())
def test_deal_gives_each_sequence_once(dealing: tuple[np.ndarray, int, int]) -> None:
    lengths, world, accumulation = dealing
    dealt = deal(lengths, priced(lengths), world, accumulation)
    assert dealt.shape == (world, accumulation, len(lengths) // (world * accumulation))
    assert sorted(dealt.ravel().tolist()) == list(range(len(lengths)))


@given(dealings())
def test_deal_brings_like_lengths_together(dealing: tuple[np.ndarray, int, int]) -> None:
    """Which sequences meet in a micro-step does not depend on what they cost, and alone a rank has them in their order."""
    lengths, world, accumulation = dealing
    dealt = deal(lengths, priced(lengths), world, accumulation)
    by_step = dealt.transpose(1, 0, 2).reshape(accumulation, -1)
    order = np.argsort(-lengths, kind="stable").reshape(accumulation, -1)
    assert np.sort(by_step).tolist() == np.sort(order).tolist()
    assert deal(lengths, priced(lengths), 1, accumulation)[0].tolist() == order.tolist()


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 9), st.sampled_from([0.0, 0.01, 1.0]))
def test_rows_are_as_even_as_their_unlike_sequences(lengths: list[int], world: int, pairs: float) -> None:
    """Two ranks differ by no more than the largest difference within a row, of which the first may be short."""
    costs = priced(np.array(lengths), pairs)
    dealt = dealt_in_rows(np.array(lengths), costs, world)
    taken = [rank[rank >= 0] for rank in dealt]
    assert sorted(np.concatenate(taken).tolist()) == list(range(len(lengths)))
    rows = np.pad(-np.sort(-costs), (-len(costs) % world, 0)).reshape(-1, world)
    loads = np.array([costs[rank].sum() for rank in taken])
    assert loads.max() - loads.min() <= (rows.max(1) - rows.min(1)).max() * (1 + 1e-9)
    sizes = [len(rank) for rank in taken]
    assert max(sizes) - min(sizes) <= 1


def striped(lengths: np.ndarray, world: int, accumulation: int) -> np.ndarray:
    """As many to each rank, by length alone: the first always gets the longest."""
    return np.argsort(-lengths, kind="stable").reshape(accumulation, -1, world).transpose(2, 0, 1)


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("world", [2, 8, 64])
@pytest.mark.parametrize(("accumulation", "micro"), [(1, 8), (4, 4), (8, 1)])
def test_ranks_wait_less_for_one_another_on_zipf_lengths(world: int, accumulation: int, micro: int, lockstep: bool) -> None:
    """The rank with most to compute in each micro-step, and that with most in the whole step, in units of an even share."""
    chance = np.random.default_rng(world)
    found = []
    for _ in range(20):
        lengths = np.minimum(chance.zipf(1.5, world * accumulation * micro), 1000)
        costs = priced(lengths, 0.005)
        for dealt in (striped(lengths, world, accumulation), deal(lengths, costs, world, accumulation, lockstep)):
            loads = costs[dealt].sum(2)
            found.append((loads.max(0).sum(), loads.sum(1).max(), costs.sum() / world))
    by_step, whole, even = np.array(found).reshape(20, 2, 3).transpose(2, 1, 0)
    assert (whole[1] <= whole[0]).all()
    assert (by_step[1] <= by_step[0] * (1 + 1e-12)).all() or not lockstep
    assert (whole[1] / even[1]).mean() < (whole[0] / even[0]).mean()
    assert micro == 1 or (by_step[1] / even[1]).mean() < (by_step[0] / even[0]).mean()


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.randoms(use_true_random=False))
def test_deal_shares_out_what_cannot_be_divided(count: int, world: int, accumulation: int, chance: random.Random) -> None:
    lengths = np.array([chance.randint(1, 30) for _ in range(count)])
    dealt = deal(lengths, priced(lengths), world, accumulation)
    assert dealt.shape[:2] == (world, accumulation)
    taken = dealt >= 0
    assert sorted(dealt[taken].tolist()) == list(range(count))
    sizes = taken.sum(2)
    assert sizes.max() - sizes.min() <= 1
    by_step = [lengths[dealt[:, step][taken[:, step]]] for step in range(accumulation)]
    for step, following in pairwise([step for step in by_step if len(step)]):
        assert step.min() >= following.max()


@given(st.lists(per_shards, min_size=1, max_size=6), seeds, st.integers(1, 4), st.data())
def test_chronological_order_is_one_pass_of_part_after_part(
    shards: list[tuple[int, ...]], seed: int, block: int, data: st.DataObject
) -> None:
    """Parts that are appended later change nothing before them."""
    per_shard, parts = sum(shards, ()), tuple(len(part) for part in shards)
    order = Order(per_shard, seed, block, parts)
    ids = order.ids(0, order.total)
    end = 0
    for number, part in enumerate(shards):
        first, end = end, end + sum(part)
        assert sorted(ids[first:end].tolist()) == list(range(first, end))
        earlier = Order(sum(shards[: number + 1], ()), seed, block, parts[: number + 1])
        assert earlier.ids(0, earlier.total).tolist() == ids[:end].tolist()
        if end < order.total:
            with pytest.raises(ValueError, match="outside"):
                earlier.ids(end, 1)
    start = data.draw(st.integers(0, order.total - 1))
    count = data.draw(st.integers(0, order.total - start))
    assert order.ids(start, count).tolist() == ids[start : start + count].tolist()


def test_the_shards_after_a_position_are_those_of_the_next_block() -> None:
    endless, single = Order((5,) * 6, 3, 2), Order((5,) * 6, 3, 2, (4, 2))
    for order, positions in ((endless, range(50)), (single, range(20))):
        shards = order.ids(0, positions.stop + 10) // 5
        blocks = [set(shards[i : i + 10].tolist()) for i in range(0, len(shards), 10)]
        for position in positions:
            assert set(order.shards_after(position)) == blocks[position // 10 + 1]
    assert single.shards_after(29) == ()


@given(
    per_shards,
    seeds,
    st.lists(st.sampled_from([(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)]), min_size=1, max_size=12),
)
def test_a_run_whose_workers_change_covers_every_sequence_once_per_epoch(
    per_shard: tuple[int, ...], seed: int, worlds: list[tuple[int, int]]
) -> None:
    """Each step may run on another number of workers: the union over ranks is the same global batch."""
    order, batch, consumed = Order(per_shard, seed, 2), 12, []
    for number, (world, accumulation) in enumerate(worlds):
        ids = order.ids(number * batch, batch)
        dealt = deal(ids % 5, 1.0 + ids % 5, world, accumulation)
        union = np.concatenate([ids[dealt[rank]].ravel() for rank in range(world)])
        assert sorted(union.tolist()) == sorted(ids.tolist())
        consumed += ids.tolist()
    for epoch in range(len(consumed) // order.total):
        assert sorted(consumed[epoch * order.total :][: order.total]) == list(range(order.total))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 120))
def test_micro_batches_keep_to_the_token_budget(lengths: list[int], budget: int) -> None:
    groups = fill(np.array(lengths), budget)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    sizes = [[lengths[i] for i in group] for group in groups]
    assert all(sum(group) <= budget or len(group) == 1 for group in sizes)
    # Nothing could have been joined to the group before it.
    assert all(sum(group) + after[0] > budget for group, after in pairwise(sizes))
    joined = [length for group in sizes for length in group]
    assert joined == sorted(lengths, reverse=True)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 120))
def test_micro_batches_of_padded_sequences_keep_to_the_token_budget(lengths: list[int], budget: int) -> None:
    groups = fill(np.array(lengths), budget, padded=True)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    sizes = [[lengths[i] for i in group] for group in groups]
    assert all(len(group) * max(group) <= budget or len(group) == 1 for group in sizes)
    # Nothing could have been joined to the group before it.
    assert all((len(group) + 1) * max(group) > budget for group in sizes[:-1])
    assert [length for group in sizes for length in group] == sorted(lengths, reverse=True)
