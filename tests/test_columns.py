"""Columns of the log and of the item table as signals: what is kept of them, what they tell, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrsink.config import parse_run
from ctrsink.config.data import PrepareSpec, SourceSpec
from ctrsink.config.model import DecoderSpec
from ctrsink.config.stages import Objective
from ctrsink.dataset.column_cells import known, stored
from ctrsink.dataset.reader import Dataset
from ctrsink.dataset.signal_tables import write_signals
from ctrsink.dataset.values import column_texts
from ctrsink.errors import InputError
from ctrsink.features.columns import UNKNOWN, Column, in_table
from ctrsink.prepare.build import append, prepare
from ctrsink.prepare.lookup import Lookup
from ctrsink.prepare.partition import Partition
from ctrsink.prepare.statistics import Received, Rule
from tests.builders import form_batch, tiny_model, tiny_spec
from tests.data_fixtures import make_events, prepare_spec, table_source, write_table
from tests.padded import changed

ROWS = [
    {"user": f"u{n % 4}", "item": f"i{n % 3}", "t": 1000 + 50_000 * n, "y": n % 2, "price": "", "slot": ""} for n in range(40)
]
for place, values in enumerate((("1.5", "top"), ("", " top "), ("-2e1", ""), ("3", "side"))):
    for row in ROWS[place::4]:
        row["price"], row["slot"] = values
ITEMS = [
    {"item": "i0", "title": "a", "year": "1994.0", "brand": "x"},
    {"item": "i1", "title": "b", "year": "", "brand": ""},
    {"item": "i2", "title": "c", "year": "1961", "brand": "x"},
]
ALL = ("log.price", "hashed.log.slot", "item.year", "hashed.item.brand", "mean.item.brand", "count.item.brand")


def spec_of(folder: Path, rows: list[dict[str, Any]] = ROWS, items: list[dict[str, Any]] = ITEMS, **more: Any) -> PrepareSpec:
    source: dict[str, Any] = {
        "kind": "table",
        "path": str(write_table(folder / "log.csv", rows)),
        "items": str(write_table(folder / "items.csv", items)),
        "columns": {"timestamp": "t", "label": "y"},
    }
    source["columns"] |= more.pop("source", {}).get("columns", {})
    tree = {"source": source, "tokenizer": {"train_vocabulary": 300}, "shard_events": 15, "columns": ALL, **more}
    return PrepareSpec.model_validate(tree)


def told(uri: str) -> dict[str, dict[int, Any]]:
    """Of each column the value of each event, by time."""
    found: dict[str, dict[int, Any]] = {name: {} for name in ALL}
    dataset = Dataset(uri)
    for number in range(len(dataset.manifest.shards)):
        events, items = (table.to_pylist() for table in dataset.tables(number, ALL))
        of_item = {row["item"]: row for row in items}
        for row in events:
            for place, time in enumerate(row["timestamp"]):
                for name in ALL:
                    found[name][time] = row[name][place] if name in row else of_item[row["item"][place]][name]
    return found


def test_what_is_kept_is_what_the_log_and_the_item_table_say(tmp_path: Path) -> None:
    prepare(spec_of(tmp_path), str(tmp_path / "data"))
    found = told(str(tmp_path / "data"))
    times = [row["t"] for row in ROWS]
    assert [found["log.price"][t] for t in times[:4]] == [1.5, None, -20.0, 3.0]
    assert [found["hashed.log.slot"][t] for t in times[:4]] == ["top", "top", None, "side"]
    assert [found["item.year"][t] for t in times[:3]] == [1994.0, None, 1961.0]
    assert [found["hashed.item.brand"][t] for t in times[:3]] == ["x", None, "x"]
    # As of the last full day before: outcomes of both items of the brand, drawn to the mean of all that have one by five more.
    for row in ROWS:
        before = [r for r in ROWS if r["t"] // 86400 < row["t"] // 86400 and r["item"] != "i1"]
        own = [] if row["item"] == "i1" else before
        assert found["count.item.brand"][row["t"]] == len(own)
        if before:
            overall = np.mean([r["y"] for r in before])
            mean = (sum(r["y"] for r in own) + 5 * overall) / (len(own) + 5)
            assert found["mean.item.brand"][row["t"]] == pytest.approx(mean, abs=1e-6)
        else:
            assert found["mean.item.brand"][row["t"]] is None


def test_a_later_event_changes_nothing_earlier_and_the_cut_no_byte(tmp_path: Path) -> None:
    whole, changed, cut = (str(tmp_path / name) for name in ("whole", "changed", "cut"))
    prepare(spec_of(tmp_path / "a"), whole)
    prepare(spec_of(tmp_path / "a", block_bytes=200, workers=1), cut)
    rows = [row if row["t"] < ROWS[25]["t"] else row | {"y": 1, "price": "7", "slot": "else"} for row in ROWS]
    prepare(spec_of(tmp_path / "b", rows), changed)
    one, other = told(whole), told(changed)
    for name in ALL:
        assert [one[name][row["t"]] for row in ROWS[:25]] == [other[name][row["t"]] for row in ROWS[:25]]
    hashes = [[s.events_file.sha256 for s in Dataset(uri).manifest.shards] for uri in (whole, cut)]
    assert hashes[0] == hashes[1]


def test_an_append_goes_on(tmp_path: Path) -> None:
    """With the statistics, with the columns of the events that are history, and with new values of new items."""
    items = [*ITEMS, {"item": "i9", "title": "new", "year": "2001", "brand": "x"}]
    late = [row | {"item": "i9" if row["item"] == "i2" else row["item"]} for row in ROWS[30:]]
    uri, together = str(tmp_path / "data"), str(tmp_path / "together")
    prepare(spec_of(tmp_path / "a", ROWS[:30]), uri)
    append(spec_of(tmp_path / "b", late, items, past_events=3), uri)
    prepare(spec_of(tmp_path / "c", [*ROWS[:30], *late], items), together)
    assert told(uri) == told(together)
    later = [row | {"t": row["t"] + 10**8} for row in late]
    manifest = append(spec_of(tmp_path / "d", later, items, columns=ALL[::-1], past_events=3), uri)
    assert manifest.columns == ALL
    with pytest.raises(InputError, match=r"prepare\.columns is not that of the data set"):
        append(spec_of(tmp_path / "b", late, items, columns=["log.price"]), uri)


def test_wrong_items_are_found_before_the_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrsink.prepare.partition.Partition.__call__", lambda *_: pytest.fail("the log was read"))
    for columns in (["item.brand"], ["mean.item.brnd"]):
        with pytest.raises(InputError, match=r"prepare\.columns"):
            prepare(spec_of(tmp_path, columns=columns), str(tmp_path / "data"))


def test_blocks_are_not_read_again_for_another_column_of_the_item_table(tmp_path: Path) -> None:
    """An interrupted preparation goes on from them."""
    read: list[Any] = []
    spec = spec_of(tmp_path)
    for columns in (("log.price", "item.year"), ("log.price", "hashed.item.brand")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ctrsink.prepare.assemble.Assembly.__call__", interrupted)
            own = Partition.__call__
            patch.setattr(Partition, "__call__", lambda self, n, own=own: read.append(n) or own(self, n))
            with pytest.raises(KeyboardInterrupt):
                prepare(spec.model_copy(update={"columns": columns}), str(tmp_path / "data"))
    assert read == [0]


def test_shards_of_other_columns_are_not_taken_up_again(tmp_path: Path) -> None:
    """Where an interrupted preparation left some."""
    spec, uri = spec_of(tmp_path), str(tmp_path / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctrsink.prepare.steps.scales_of_numbers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(spec.model_copy(update={"columns": ("mean.item.brand",)}), uri)
    prepare(spec.model_copy(update={"columns": ("count.item.brand",)}), uri)
    events, _ = Dataset(uri).tables(0, ("count.item.brand",))
    assert events["count.item.brand"].type == pa.list_(pa.int32())


def test_a_log_without_an_item_table_is_told_to_bring_one(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, columns=["item.year"], text={"item": "{item}"})
    source = spec.source.model_copy(update={"items": None})
    with pytest.raises(InputError, match=r"the item table has no column 'year'; give one by prepare\.source\.items"):
        prepare(spec.model_copy(update={"source": source}), str(tmp_path / "data"))


def interrupted(*_: Any) -> int:
    raise KeyboardInterrupt


def test_a_number_may_be_a_truth_value_and_an_endless_one_is_named(tmp_path: Path) -> None:
    rows = [row | {"price": ("true", " False ", "")[place % 3]} for place, row in enumerate(ROWS)]
    prepare(spec_of(tmp_path, rows), str(tmp_path / "data"))
    assert [told(str(tmp_path / "data"))["log.price"][row["t"]] for row in ROWS[:3]] == [1.0, 0.0, None]
    pq.write_table(
        pa.table({"item": ["i0", "i1", "i2"], "title": ["a", "b", "c"], "year": [1.0, np.inf, 2.0]}), tmp_path / "i.parquet"
    )
    spec = spec_of(tmp_path, columns=["item.year"])
    spec = spec.model_copy(update={"source": spec.source.model_copy(update={"items": str(tmp_path / "i.parquet")})})
    with pytest.raises(InputError, match=r"i\.parquet.*year.*inf is not a finite number"):
        prepare(spec, str(tmp_path / "other"))


def test_the_files_for_other_models_have_the_numbers(tmp_path: Path) -> None:
    prepare(spec_of(tmp_path), str(tmp_path / "data"))
    write_signals(str(tmp_path / "data"), str(tmp_path / "signals"))
    table = pq.read_table(tmp_path / "signals" / "train.parquet")
    assert {"log.price", "item.year", "mean.item.brand", "count.item.brand"} <= set(table.column_names)
    counts = told(str(tmp_path / "data"))["count.item.brand"]
    expected = [np.log1p(counts[time]) for time in table.column("timestamp").to_pylist()]
    np.testing.assert_allclose(table.column("count.item.brand").to_numpy(), expected, rtol=1e-6)
    prices = {row["t"]: float(row["price"]) if row["price"] else None for row in ROWS}
    assert table.column("log.price").to_pylist() == [prices[t] for t in table.column("timestamp").to_pylist()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": ["log.y"]}, r"columns: log\.y is the answer that is to be foretold"),
        ({"columns": ["hashed.log.y"]}, r"columns: hashed\.log\.y is the answer"),
        ({"columns": ["log.feel"], "source": {"columns": {"feedback": "feel"}}}, r"columns: log\.feel is the answer"),
        ({"columns": ["hashed.item.id"]}, r"prepare\.columns names a column 'id' .*items_columns=\{my_id: id\}"),
        ({"columns": ["hashed.item.item"]}, r"prepare\.columns names a column 'item' of the item table, as something else"),
        ({"columns": ["item.item_mean"]}, r"prepare\.columns names a column 'item_mean' of the item table, as something else"),
        ({"columns": ["hashed.item.log.price"]}, r"names a column 'log\.price' .*items_columns=\{my_log_price: log\.price\}"),
        ({"text": {"item": "{title} {item_count}"}}, r"prepare\.text\.item names a column 'item_count'"),
        ({"statistics": {"fields": [{"column": "text"}]}}, r"prepare\.statistics\.fields names a column 'text'"),
        (
            {"statistics": {"fields": [{"column": "brnd"}]}},
            r"statistics\.fields: the item table has no column 'brnd'",
        ),
        ({"columns": ["log.price", "log.price"]}, "columns: name each once"),
        ({"columns": ["price"]}, r"'price' is no column: write log\.NAME or item\.NAME"),
        ({"columns": ["mean.log.price"]}, r"'mean\.log\.price' is no column"),
        ({"neighbours": {"by_text": True}}, r"neighbours\.by_text compares the texts of items: add prepare\.encoder"),
        ({"columns": ["log.prise"]}, r"log\.csv has no column 'prise'.*did you mean price"),
        (
            {"columns": ["item.brnd"]},
            r"item\.brnd: the item table has no column 'brnd'; it has title, year, brand: did you mean brand",
        ),
        ({"columns": ["mean.item.brnd"]}, r"prepare\.columns mean\.item\.brnd: the item table has no column"),
        ({"columns": ["item.brand"]}, r"item\.brand: item 'i0' has 'x' there, which is no number .* take hashed\.item\.brand"),
        ({"columns": ["log.slot"]}, r"log\.csv, row 1 \(line 2\), column slot: 'top' is not a number that float32 holds"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, ValueError), match=message):
        prepare(spec_of(tmp_path, **change), str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_a_public_log_has_no_columns_of_ones_own(tmp_path: Path) -> None:
    spec = prepare_spec(table_source(tmp_path, make_events())).model_copy(
        update={"source": SourceSpec(kind="movielens", path=str(tmp_path)), "columns": ("log.price",)}
    )
    with pytest.raises(InputError, match=r"prepare\.columns: log\.price is of a log of one's own \(kind table\)"):
        prepare(spec, str(tmp_path / "data"))


def test_a_bad_number_is_skipped_with_its_row(tmp_path: Path) -> None:
    rows = [row | {"price": "1e39"} if place == 3 else row for place, row in enumerate(ROWS)]
    manifest = prepare(spec_of(tmp_path, rows), str(tmp_path / "data"), on_bad_row="skip")
    assert manifest.skipped_rows == 1
    assert ROWS[3]["t"] not in told(str(tmp_path / "data"))["log.price"]


@pytest.mark.parametrize(("value", "same"), [(1994, "1994.0"), (True, "true"), ("Ä", "A\u0308"), (6.10, "6.1"), (" x ", "x")])
def test_a_category_has_one_number_however_it_is_written(value: Any, same: str) -> None:
    column = Column.parse("hashed.log.slot")
    assert column is not None
    cells = (pa.array([value]), pa.array([same]))
    one, other = (known(column, stored(column, column_texts(own)[0])[0]) for own in cells)
    assert one.tolist() == other.tolist() != [UNKNOWN]


@given(st.lists(st.integers(-1, 2**63 - 1), max_size=20), st.integers(2, 50))
def test_hashes_share_the_rows_of_a_table(hashes: list[int], rows: int) -> None:
    found = in_table(np.array(hashes, np.int64), rows)
    assert [value == 0 for value in found] == [value < 0 for value in hashes]
    assert all(0 <= value < rows for value in found)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=30))
def test_statistics_of_groups_are_those_of_their_items_together(events: list[tuple[int, int, int]]) -> None:
    """Counted anew, by group in place of item, they are the same to the bit."""
    items, days, outcomes = (np.array(of) for of in zip(*events, strict=True))
    groups = np.array([1, 0, -1, 1, 0])
    rule, ids = Rule(86400, 5.0), pa.array([str(n) for n in range(5)])
    by_item = Received.of([rule.count(ids.take(pa.array(items)), days * 86400, outcomes.astype(float))], Lookup.of(ids), None)
    has = groups[items] >= 0
    names = ids.take(pa.array(groups[items][has]))
    plain = Received.of([rule.count(names, days[has] * 86400, outcomes[has].astype(float))], Lookup.of(ids), None)
    assert by_item.grouped(groups).to_table() == plain.to_table()


def test_the_base_score_is_what_the_model_adds_to() -> None:
    batch = form_batch("per_user", 3, (9, 5))
    model = tiny_model(tiny_spec())
    base = torch.randn(batch.targets.labels.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(batch, Objective()).logits
        added = model(changed(batch, base=base), Objective()).logits
    torch.testing.assert_close(added, plain + base)


@pytest.mark.parametrize("base", ["item.price", "hashed.log.slot", "mean.item.brand"])
def test_the_base_score_is_a_number_of_the_log(base: str) -> None:
    with pytest.raises(ValueError, match=f"{base} is no number of the log: name its column as log.NAME"):
        DecoderSpec.model_validate({"backbone": {"config": {"model_type": "llama"}}, "base": base})


def test_ids_need_a_stage_that_trains_them(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "name": "x",
        "run_dir": str(tmp_path),
        "data": {"uri": "data"},
        "model": {"backbone": {"config": {"model_type": "llama"}}, "target": {"signals": ["user_id"]}, "bias": None},
        "stages": [{"name": "all", "trainable": ["head"], "lr": {"head": 0.1}, "steps": 1}],
    }
    with pytest.raises(InputError, match="stages: none trains the group ids, which the signal user_id has its embeddings in"):
        parse_run(tree, "test")
    tree["stages"][0] |= {"trainable": ["head", "ids"], "lr": {"head": 0.1, "ids": 0.01}}
    assert parse_run(tree, "test").model.ids == ("user_id",)
    tree["model"]["target"]["signals"] = ["item_mean"]
    with pytest.raises(InputError, match="trainable ids does not exist, because no signal is item_id or user_id"):
        parse_run(tree, "test")
