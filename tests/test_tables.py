"""Tables that ranks share: trained as one dense table would be, whoever holds which row, and read by any number of ranks."""

import json
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.dist import Topology
from ctrsink.errors import InputError
from ctrsink.tables import files
from ctrsink.tables.embedding import ShardedEmbedding, held_of, share_out, tables_of
from ctrsink.tables.files import DamagedTable, folder_of, read_tables, save_tables
from ctrsink.tables.hashing import rows_of
from ctrsink.tables.sums import RowSums
from ctrsink.tables.table import EPSILON, RowTable
from tests.rank_processes import run_ranks
from tests.tables_ranks import DIVISOR, LR, RUNS, STEPS, Model, Run, batches, results

REPOSITORY = Path(__file__).parents[1]
Entries = dict[str, tuple[int, str]]


def plain(entries: dict[str, dict[str, Any]]) -> Entries:
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}


def one(**changed: Any) -> RowTable:
    return RowTable(**({"rows": 100, "width": 3, "std": 0.5, "seed": 7} | changed))


def placed(rank: int, world: int, **changed: Any) -> RowTable:
    table = one(**changed)
    table.place(Topology(rank, world))
    return table


def saved(world: int, folder: Path, **changed: Any) -> Entries:
    """A table of random values and state, saved by so many ranks; the values are those of the same rows whatever their number."""
    entries: dict[str, dict[str, Any]] = {}
    for rank in range(world):
        table = placed(rank, world, **changed)
        values, squares = random_state(table.rows, table.width)
        table.put(0, values, squares)
        entries |= save_tables({"t": table}, str(folder))
    return plain(entries)


def load(table: RowTable, folder: Path, entries: Entries) -> None:
    table.take(read_tables(str(folder), entries, table.topology)["t"])


def random_state(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, width, generator=generator), torch.rand(rows, generator=generator)


# Training


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[dict[str, Any]]]]:
    """By number of ranks: what each rank printed."""
    found = {}
    for world in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"world{world}")
        if world == 1:
            found[world] = [list(results(Topology(), folder))]
        else:
            found[world] = start(world, folder)
        for lines in found[world]:
            for line in lines:
                line["folder"] = folder
    return found


def start(world: int, folder: Path) -> list[list[dict[str, Any]]]:
    arguments = [str(world), str(folder / "store"), str(folder)]
    return run_ranks(["-m", "tests.tables_ranks"], world, arguments, REPOSITORY, 120)


def dense(run: Run) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """Values, state and norms of the same steps with whole tables that autograd knows, all sequences at once."""
    tables = tables_of(Model(run))
    weights = {name: table.values.clone().requires_grad_() for name, table in tables.items()}
    squares = {name: torch.zeros(run.rows) for name in tables}

    def of(name: str, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(rows_of(ids, run.rows), weights[name])

    norms = []
    for step in range(STEPS):
        ids = torch.cat(batches(run, step))
        item, user = partial(of, "ids.item"), partial(of, "ids.user")
        loss = (item(ids[:, :2]).sum(1) * user(ids[:, 2])).sum(1).tanh().sum() + item(ids[:, 0]).square().sum()
        (loss / DIVISOR).backward()
        norms.append(float(torch.nn.utils.get_total_norm([w.grad for w in weights.values() if w.grad is not None])))
        with torch.no_grad():
            for name, weight in weights.items():
                assert weight.grad is not None
                gradient = 0.5 * weight.grad
                squares[name] += gradient.square().mean(1)
                weight -= LR * gradient / (squares[name].sqrt() + EPSILON)[:, None]
                weight.grad = None
    return {name: weight.detach() for name, weight in weights.items()}, squares, norms


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_is_that_of_dense_tables_however_a_batch_is_dealt_out(world: int, name: str, ran: Any) -> None:
    run = RUNS[name]
    values, squares, norms = dense(run)
    lines = [next(line for line in rank if line["name"] == name) for rank in ran[world]]
    entries = plain({path: entry for line in lines for path, entry in line["entries"].items()})
    model = Model(run)
    initial = {key: table.values.clone() for key, table in tables_of(model).items()}
    tables = share_out(model, Topology(), read_tables(str(lines[0]["folder"] / name), entries, Topology()))
    for key, table in tables.items():
        torch.testing.assert_close(table.values, values[key], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(table.squares, squares[key], rtol=1e-5, atol=1e-12)
        never = squares[key] == 0
        assert torch.equal(table.values[never], initial[key][never])
        assert not torch.equal(table.values[~never], initial[key][~never])
    for line in lines:
        np.testing.assert_allclose(line["norms"], norms, rtol=1e-5)


def test_some_rows_are_never_touched() -> None:
    """So the test above looks at them."""
    assert all(bool((squares == 0).any()) for squares in dense(RUNS["one"])[1].values())


def test_rows_that_a_step_does_not_touch_keep_every_bit() -> None:
    table = one()
    before = table.values.clone()
    for _ in range(3):
        table.lookup(torch.tensor([5, 9, 9])).square().sum().backward()
        table.collect()
        table.step(0.1)
    changed = (table.values != before).any(1).nonzero().flatten()
    assert changed.tolist() == [5, 9]
    assert table.squares.nonzero().flatten().tolist() == [5, 9]


def test_the_first_step_of_a_row_has_the_length_of_the_learning_rate() -> None:
    table = one()
    before = table.values[4].clone()
    (1e-6 * table.lookup(torch.tensor([4]))).sum().backward()
    table.collect()
    table.step(0.1)
    torch.testing.assert_close(table.values[4], before - 0.1, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_seen_and_can_be_forgotten(bad: float) -> None:
    table = one()
    before = table.values.clone()
    (bad * table.lookup(torch.tensor([4, 5]))).sum().backward()
    table.collect()
    assert not np.isfinite(table.squared_norm())
    (bad * table.lookup(torch.tensor([6]))).sum().backward()
    table.discard()
    table.collect()
    assert table.squared_norm() == 0
    table.step(0.1)
    assert torch.equal(table.values, before)
    assert table.is_finite()
    table.put(7, torch.full((1, 3), bad))
    assert not table.is_finite()


def test_a_graph_that_is_walked_twice_counts_twice() -> None:
    table = one()
    loss = table.lookup(torch.tensor([4])).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    table.collect()
    assert table.squared_norm() == pytest.approx(3 * 2.0**2)


def test_gradients_are_kept_only_of_lookups_that_are_trained() -> None:
    table = one()
    with torch.no_grad():
        assert not table.lookup(torch.tensor([1])).requires_grad
    table.trained = False
    assert not table.lookup(torch.tensor([1])).requires_grad
    table.trained = True
    assert table.lookup(torch.tensor([1])).requires_grad


def test_nothing_looked_up_is_nothing_learned() -> None:
    embedding = ShardedEmbedding(10, 3)
    before = embedding.table.values.clone()
    out = embedding(torch.zeros(0, 2, dtype=torch.int64))
    assert out.shape == (0, 2, 3)
    out.sum().backward()
    embedding.table.collect()
    assert embedding.table.squared_norm() == 0
    embedding.table.step(0.1)
    assert torch.equal(embedding.table.values, before)


def test_a_module_with_tables_runs_in_mixed_precision_and_holds_no_parameter_of_them() -> None:
    embedding = ShardedEmbedding(10, 4)
    layer = torch.nn.Linear(4, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = embedding(torch.tensor([[0, 1], [-1, 2]]))
        layer(found).float().sum().backward()
    assert found.dtype == torch.float32
    embedding.table.collect()
    torch.testing.assert_close(embedding.table.squared_norm(), 4 * float(layer.weight.detach().bfloat16().float().square().sum()))
    assert not list(embedding.parameters())
    assert not embedding.state_dict()
    assert list(tables_of(torch.nn.ModuleDict({"a": torch.nn.Sequential(embedding), "b": layer}))) == ["a.0"]


@given(st.lists(st.lists(st.integers(0, 30), max_size=12), max_size=12))
def test_sums_by_row_are_those_of_all_that_was_added(added: list[list[int]]) -> None:
    sums, expected = RowSums(2), torch.zeros(31, 2)
    for number, rows in enumerate(added):
        once = torch.tensor(sorted(set(rows)), dtype=torch.int64)
        vectors = torch.arange(2.0 * len(once)).view(-1, 2) + number
        expected.index_add_(0, once, vectors)
        sums.add(once, vectors)
    rows, found = sums.take("cpu")
    assert rows.tolist() == sorted({row for one in added for row in one})
    assert torch.equal(found, expected[rows])
    assert len(sums.take("cpu")[0]) == 0


def test_sums_hold_what_rows_differ_not_what_was_added() -> None:
    sums, added = RowSums(2), []
    for _ in range(50):
        vectors = torch.ones(3, 2)
        added.append(weakref.ref(vectors))
        sums.add(torch.tensor([1, 5, 9]), vectors)
        del vectors
    assert sum(one() is not None for one in added) <= 3
    assert torch.equal(sums.take("cpu")[1], torch.full((3, 2), 50.0))


# Rows


@given(st.integers(1, 300), st.integers(1, 5), st.integers(1, 5), st.integers(1, 100))
@settings(max_examples=40, deadline=None)
def test_any_number_of_ranks_reads_exactly_what_any_other_wrote(
    tmp_path_factory: pytest.TempPathFactory, rows: int, wrote: int, reads: int, rows_of_a_file: int
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "FILE_BYTES", 16 * rows_of_a_file)
        entries = saved(wrote, folder, rows=rows)
    values, squares = random_state(rows, 3)
    for rank in range(reads):
        table = placed(rank, reads, rows=rows, seed=8)
        load(table, folder, entries)
        own = slice(table.own.start, table.own.stop)
        assert torch.equal(table.values, values[own])
        assert torch.equal(table.squares, squares[own])


def test_a_rank_reads_only_files_with_rows_of_its_own(tmp_path: Path) -> None:
    entries = saved(3, tmp_path)
    (tmp_path / next(name for name in sorted(entries))).unlink()
    load(placed(1, 2), tmp_path, entries)
    with pytest.raises(DamagedTable, match="is missing"):
        load(placed(0, 2), tmp_path, entries)


def test_files_of_an_interrupted_save_by_other_ranks_do_no_harm(tmp_path: Path) -> None:
    saved(2, tmp_path, seed=1)
    entries = saved(3, tmp_path)
    table = one()
    load(table, tmp_path, entries)
    assert torch.equal(table.values, random_state(100, 3)[0])


def one_line(folder: Path, entries: Entries) -> str:
    with pytest.raises(DamagedTable) as caught:
        read_tables(str(folder), entries, Topology())
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder / "t") in message
    return message


def test_a_file_that_is_not_what_was_written_is_refused_in_one_line(tmp_path: Path) -> None:
    entries = saved(2, tmp_path)
    path = tmp_path / sorted(entries)[1]
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert one_line(tmp_path, entries) == f"{path} is damaged: it has {len(content) - 1} bytes, not {len(content)}"
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert one_line(tmp_path, entries) == f"{path} is damaged: it does not match its hash"
    path.unlink()
    assert one_line(tmp_path, entries) == f"{path} is missing"
    del entries[sorted(entries)[0]]
    assert "do not hold each of the 100 rows once" in one_line(tmp_path, entries)
    assert read_tables(str(tmp_path), {}, Topology()) == {}


def one_embedding(rows: int = 100, width: int = 3, name: str = "t") -> torch.nn.Module:
    return torch.nn.ModuleDict({name: ShardedEmbedding(rows, width)})


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (one_embedding(101), "the table t has 100 rows of 3, not 101 of 3"),
        (one_embedding(width=4), "the table t has 100 rows of 3, not 100 of 4"),
        (one_embedding(name="a"), "the table a is here and not there"),
        (torch.nn.Linear(2, 2), "the table t is there and not here"),
    ],
)
def test_a_table_of_other_sizes_is_refused(other: torch.nn.Module, says: str, tmp_path: Path) -> None:
    held = read_tables(str(tmp_path), saved(2, tmp_path), Topology())
    with pytest.raises(InputError, match=f"the checkpoint does not fit the model: {says}$"):
        share_out(other, Topology(), held)


def test_what_a_rank_holds_goes_on_in_another_model_without_a_copy() -> None:
    first, second = one_embedding(), one_embedding()
    (table,) = share_out(first, Topology(1, 2), None).values()
    before = table.values.clone()
    (again,) = share_out(second, Topology(1, 2), held_of(tables_of(first))).values()
    assert again.values.data_ptr() == table.values.data_ptr()
    assert torch.equal(again.values, before)
    with pytest.raises(InputError, match="100 rows of 3"):
        share_out(one_embedding(), Topology(0, 3), held_of(tables_of(first)))


def test_vectors_are_what_a_lookup_finds_in_the_order_of_the_ids() -> None:
    embedding = ShardedEmbedding(300, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctrsink.tables.embedding._AT_ONCE", 7)
        found = embedding.vectors(range(-1, 299))
    assert torch.equal(found, embedding(torch.arange(-1, 299)).detach())
    assert torch.equal(found[0], embedding.table.values[0])
    assert len(found.unique(dim=0)) == 300


@pytest.mark.parametrize("name", ["a.ids.item__id", "a/../../b", "ü" * 300, "x y", "..", "a" * 200])
def test_a_table_may_have_any_name(name: str, tmp_path: Path) -> None:
    table, again = one(), one(seed=8)
    entries = plain(save_tables({name: table, "other": one(seed=9)}, str(tmp_path / "in")))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    again.take(read_tables(str(tmp_path / "in"), entries, Topology())[folder_of(name)])
    assert torch.equal(again.values, table.values)
    assert len({folder_of(other) for other in ("a/b", "a_b", "a b", name)}) == 4


@pytest.mark.slow
def test_the_benchmark_tells_steps_memory_and_files(tmp_path: Path) -> None:
    sizes = ["--rows", "100", "1000", "--whole-rows", "200", "--touched", "40", "--steps", "2", "--work", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tables", "--json", *sizes], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [(row["rows"], row["workers"]) for row in report["tables"]] == [(100, 2), (1000, 2), (200, 1)]
    assert all(value > 0 for row in report["tables"] for name, value in row.items() if name.endswith("_s"))
    assert report["tables"][1]["file_bytes"] > 1000 * 33 * 4 > report["tables"][0]["file_bytes"]
    assert report["ratio"] > 0
    assert list(tmp_path.iterdir()) == []
