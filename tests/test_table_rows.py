"""Which rows of a table an id has, who holds them, and what they are at the start."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.dist import Topology
from ctrsink.tables.embedding import ShardedEmbedding
from ctrsink.tables.hashing import MOST_ROWS, rows_of
from ctrsink.tables.initial import initial_values
from ctrsink.tables.shares import bytes_needed, counts_by_owner, share
from tests.test_tables import one, placed


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20),
    st.one_of(st.integers(2, 50), st.integers(2, MOST_ROWS)),
)
def test_every_id_has_rows_of_the_table_and_the_unknown_have_the_first(ids: list[int], rows: int) -> None:
    found = rows_of(torch.tensor(ids, dtype=torch.int64), rows)
    for number, own in zip(ids, found.tolist(), strict=True):
        assert own == 0 if number < 0 else 1 <= own < rows


@given(st.integers(2, 3000))
def test_ids_below_the_number_of_rows_share_none(rows: int) -> None:
    found = rows_of(torch.arange(rows - 1), rows)
    assert sorted(found.tolist()) == list(range(1, rows))


@given(st.integers(1000, 100_000), st.integers(2, 8), st.integers(0, 10_000))
@settings(max_examples=30)
def test_neighbouring_ids_are_spread_evenly_over_ranks(rows: int, world: int, first: int) -> None:
    named = rows_of(torch.arange(first, first + 900), rows).sort().values
    counts = counts_by_owner(named, rows, world)
    assert sum(counts) == 900
    assert max(counts) - min(counts) < 60


@pytest.mark.parametrize("rows", [1, MOST_ROWS + 1])
def test_sizes_that_cannot_be_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"a table of {rows} rows"):
        rows_of(torch.tensor([1]), rows)


# Ownership


@given(st.integers(1, 5000), st.integers(1, 40))
def test_each_row_has_one_owner_and_shares_are_equal(rows: int, world: int) -> None:
    shares = [share(rows, rank, world) for rank in range(world)]
    assert [row for own in shares for row in own] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert bytes_needed(rows, 3, world) == 16 * max(map(len, shares))


@given(st.sets(st.integers(0, 199)), st.integers(1, 300))
def test_rows_go_to_their_owners(named: set[int], world: int) -> None:
    counts = counts_by_owner(torch.tensor(sorted(named), dtype=torch.int64), 200, world)
    assert counts == [len(named & set(share(200, rank, world))) for rank in range(world)]


@given(st.integers(1, 400), st.integers(1, 9), st.integers(0, 2**64 - 1))
@settings(max_examples=30)
def test_the_values_at_the_start_do_not_depend_on_the_number_of_ranks(rows: int, world: int, seed: int) -> None:
    whole = one(rows=rows, seed=seed).values
    parts = [placed(rank, world, rows=rows, seed=seed).values for rank in range(world)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_values_at_the_start_are_near_to_normal_and_independent() -> None:
    blocks = list(initial_values(range(17, 60_017), 8, 2.0, 1))
    values = np.concatenate([block for _, block in blocks])
    assert [first for first, _ in blocks] == [17 + 2048 * n for n in range(len(blocks))]
    assert values.dtype == np.float32
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 2) < 0.02
    assert abs((np.abs(values) < 2).mean() - 0.683) < 0.02
    assert np.abs(np.corrcoef(values.T) - np.eye(8)).max() < 0.02
    other = next(initial_values(range(17, 60_017), 8, 2.0, 2))[1]
    assert abs(np.corrcoef(values[:2048].ravel(), other.ravel())[0, 1]) < 0.03


def test_the_vectors_of_ids_start_at_the_scale_asked_for() -> None:
    found = ShardedEmbedding(20_000, 8, 0.3)(torch.arange(15_000)).detach()
    assert abs(float(found.std()) - 0.3) < 0.01


def test_the_seed_of_a_table_is_that_of_the_module_around_it() -> None:
    def values(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        return ShardedEmbedding(9, 2).table.values, ShardedEmbedding(9, 2).table.values

    (one, other), again, (third, _) = values(1), values(1), values(2)
    assert torch.equal(one, again[0])
    assert torch.equal(other, again[1])
    assert not torch.equal(one, other)
    assert not torch.equal(one, third)


def test_a_table_in_use_is_not_shared_out_anew() -> None:
    table = placed(1, 2)
    assert len(table.values) == 50
    table.place(Topology(1, 2))
    with pytest.raises(RuntimeError, match="before its first lookup"):
        table.place(Topology(1, 3))


# Files
