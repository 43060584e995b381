"""Ids are texts and whole numbers, the same in every format; what is neither is named, and so is a column by another name."""

import csv
import datetime
import math
import re
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrsink.config.data import SourceSpec, SplitSpec, TextSpec
from ctrsink.dataset.manifest import read_manifest
from ctrsink.dataset.reader import Dataset
from ctrsink.dataset.values import column_texts
from ctrsink.errors import InputError
from ctrsink.prepare.build import append, prepare
from tests.value_fixtures import SHOP, log_rows, spec_for, write_jsonl


def users_of(uri: str) -> set[str]:
    dataset = Dataset(uri)
    return {str(user) for number in range(len(dataset.manifest.shards)) for user in dataset.shard(number).users}


@pytest.mark.parametrize("first", [True, False], ids=["doubles-first", "integers-first"])
def test_doubles_and_integers_are_the_same_users_across_files_and_through_append(tmp_path: Path, first: bool) -> None:
    folder, table = tmp_path / "log", log_rows(list(range(6)))
    folder.mkdir()
    for name, a, b, kind in (("a", 0, 30, first), ("b", 30, 45, not first)):
        part = pa.table({key: column[a:b] for key, column in table.items()})
        kind = pa.float64() if kind else pa.int64()
        pq.write_table(part.set_column(0, "user", part["user"].cast(kind)), folder / f"{name}.parquet")
    prepare(spec_for(folder), str(tmp_path / "data"))
    assert users_of(str(tmp_path / "data")) == set("012345")
    later = pa.table({key: column[45:] for key, column in table.items()})
    pq.write_table(later.set_column(0, "user", later["user"].cast(pa.float32())), tmp_path / "later.parquet")
    spec = spec_for(tmp_path / "later.parquet").model_copy(update={"split": SplitSpec(train=0.6, valid=0)})
    append(spec, str(tmp_path / "data"))
    assert users_of(str(tmp_path / "data")) == set("012345")


@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
@pytest.mark.parametrize("column", ["user", "item"])
@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (2.0**53 + 2, pa.float64(), r"9007199254740994\.0 .* lies beyond 2\^53"),
        (2.0**24 + 2, pa.float32(), r"16777218\.0 .* lies beyond 2\^24"),
        (0.5, pa.float64(), r"0\.5 .* is no whole number"),
        (-math.inf, pa.float64(), r"-inf .* is no whole number"),
    ],
)
def test_floating_ids_that_may_have_been_rounded_refuse_the_file(
    tmp_path: Path, value: float, kind: pa.DataType, message: str, column: str, on_bad_row: Any
) -> None:
    ids = [float(n % 4) for n in range(60)]
    ids[40] = value
    table = pa.table(log_rows(["u"]) | {column: pa.array(ids, kind)})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=16)
    with pytest.raises(InputError, match=rf"log\.parquet, row 41, column {column}: {message}.*write ids as integers or as text"):
        prepare(spec_for(tmp_path / "log.parquet").model_copy(update={"block_bytes": 1}), str(tmp_path / "data"), on_bad_row)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_nan_is_no_user_and_no_request(tmp_path: Path, ending: str) -> None:
    users = [math.nan if n % 4 == 3 else float(n % 4) for n in range(60)]
    table = log_rows(["u"]) | {"user": users, "shown": [math.nan if n % 2 else 1.0 for n in range(60)]}
    path = tmp_path / f"log.{ending}"
    _ = pq.write_table(pa.table(table), path) if ending == "parquet" else write_jsonl(path, table)
    spec = spec_for(path)
    columns = spec.source.columns.model_copy(update={"request": "shown"})
    spec = spec.model_copy(update={"source": spec.source.model_copy(update={"columns": columns})})
    with pytest.raises(InputError, match=r"row 4.*, column user: a value is missing"):
        prepare(spec, str(tmp_path / "data"))
    assert prepare(spec, str(tmp_path / "data"), "skip").skipped_rows == 15
    assert users_of(str(tmp_path / "data")) == set("012")
    assert set(shard_column(str(tmp_path / "data"), "request")) == {"1", None}


def shard_column(uri: str, name: str) -> list[Any]:
    entries = read_manifest(uri).shards
    tables = [pq.read_table(f"{uri}/{entry.events_file.path}", columns=[name]) for entry in entries]
    return [value for table in tables for row in table[name].to_pylist() for value in row]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_whole_ids_with_and_without_a_fraction_are_warned_of(
    tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    def log_of(name: str, users: list[Any], start: int, end: int) -> Path:
        table = {key: column[start:end] for key, column in log_rows(users).items()}
        path = tmp_path / name / f"log.{ending}"
        path.parent.mkdir(exist_ok=True)
        if ending == "csv":
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([tuple(table), *zip(*table.values(), strict=True)])
        return path if ending == "csv" else write_jsonl(path, table)

    for users, warned in (([1.0, 2.0], False), ([1, 2, "x"], False), ([1, 2.0], True)):
        caplog.clear()
        prepare(spec_for(log_of("first", users, 0, 30)), str(tmp_path / "data"), overwrite=True)
        assert ("column user: ids are written as 2.0 and as 1; as text, 5.0 and 5 are two ids" in caplog.text) == warned
    # A folder's files, in blocks of their own, and what is appended.
    prepare(spec_for(log_of("first", [1, 2], 0, 30)), str(tmp_path / "data"), overwrite=True)
    caplog.clear()
    later = spec_for(log_of("later", [1.0, 2.0], 30, 60)).model_copy(update={"split": SplitSpec(train=0.6, valid=0)})
    append(later, str(tmp_path / "data"))
    if ending == "csv":
        assert "column user: ids are written as 1.0 and as" in caplog.text
    # In jsonl they are numbers, and the same.
    assert users_of(str(tmp_path / "data")) == ({"1", "2"} if ending == "jsonl" else {"1", "2", "1.0", "2.0"})


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.struct({"a": pa.int8()}), {"a": 1}),
        (pa.map_(pa.int8(), pa.int8()), [(1, 2)]),
        (pa.timestamp("s"), datetime.datetime(2020, 1, 1)),
        (pa.date32(), datetime.date(2020, 1, 1)),
        (pa.list_(pa.int8()), [1]),
    ],
    ids=str,
)
def test_columns_of_other_types_hold_no_ids(tmp_path: Path, kind: pa.DataType, value: Any) -> None:
    table = pa.table(log_rows(["u"]) | {"user": pa.array([value] * 60, kind)})
    pq.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(InputError, match=r"log\.parquet: column user must hold ids, but it is of type"):
        prepare(spec_for(tmp_path / "log.parquet"), str(tmp_path / "data"))


def test_uuids_are_ids(tmp_path: Path) -> None:
    known = [uuid.UUID(int=n) for n in range(3)]
    users = pa.array([known[n % 3].bytes for n in range(60)], pa.binary(16)).cast(pa.uuid())
    pq.write_table(pa.table(log_rows(["u"]) | {"user": users}), tmp_path / "log.parquet")
    prepare(spec_for(tmp_path / "log.parquet"), str(tmp_path / "data"))
    assert users_of(str(tmp_path / "data")) == {str(user) for user in known}


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ('"half \\ud83d"', r"'\\ud83d' is half a surrogate pair"),
        ('{"id": 1}', "an object is no id"),
        ("[1]", "a list is no id"),
        ("true", "a truth value is no id"),
        ("5.5", r"5\.5 is a floating-point number and is no whole number"),
        ("1e999", "inf is a floating-point number"),
        ("NaN", "a value is missing"),
    ],
)
def test_a_json_value_that_is_no_id_is_a_bad_row(tmp_path: Path, user: str, message: str) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", log_rows(["u", "v"]))
    lines = path.read_text().splitlines()
    lines[7] = lines[7].replace('"v"', user)
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=rf"log\.jsonl, row 8 \(line 8\), column user: {message}"):
        prepare(spec_for(path), str(tmp_path / "data"))
    assert prepare(spec_for(path), str(tmp_path / "data"), "skip").skipped_rows == 1


@pytest.mark.parametrize(
    ("title", "message"),
    [('"Film \\ud83d"', "half a surrogate pair"), ('{"en": "Film"}', "an object is no text"), ("1e999", "not a finite number")],
)
def test_an_item_without_text_is_named_where_the_template_needs_it(
    tmp_path: Path, title: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    items = tmp_path / "items.jsonl"
    good = "".join(f'{{"item": "i{n}", "title": "Film", "details": "{n}"}}\n' for n in range(1, len(SHOP)))
    log = write_jsonl(tmp_path / "log.jsonl", log_rows(["u"]))
    items.write_text(f'{good}{{"item": "i0", "title": {title}, "details": ""}}\n')
    with pytest.raises(InputError, match=rf"items\.jsonl, row 6 \(line 6\), column title: .*{message}") as caught:
        prepare(spec_for(log, items), str(tmp_path / "data"))
    assert "\n" not in str(caught.value)
    items.write_text(f'{good}{{"item": "i0", "title": "Film", "details": {title}}}\n')
    prepare(spec_for(log, items), str(tmp_path / "data"))
    assert f"{items}, row 6 (line 6), column details: " in caplog.text
    assert Dataset(str(tmp_path / "data")).read_items().column_names == ["id", "title", "text"]


def test_bytes_of_an_item_are_its_text_or_are_named(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", log_rows(["u"]))
    for encoding, refused in (("utf-8", False), ("latin-1", True)):
        rows = {"item": [f"i{n}".encode() for n in range(6)], "title": [f"Caf\u00e9 {n}".encode(encoding) for n in range(6)]}
        pq.write_table(pa.table(rows), tmp_path / "items.parquet")
        if refused:
            with pytest.raises(InputError, match=r"items\.parquet, row 1, column title: the bytes .* are no UTF-8 text"):
                prepare(spec_for(log, tmp_path / "items.parquet"), str(tmp_path / "other"))
        else:
            prepare(spec_for(log, tmp_path / "items.parquet"), str(tmp_path / "data"))
            assert Dataset(str(tmp_path / "data")).read_items()["text"][0].as_py() == "Caf\u00e9 0"


def test_composed_and_decomposed_letters_are_one_text(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", log_rows(["u"]))
    titles = ["Caf\u00e9", "Cafe\u0301"] * 3
    write_jsonl(tmp_path / "items.jsonl", {"item": [f"i{n}" for n in range(6)], "title": titles})
    prepare(spec_for(log, tmp_path / "items.jsonl"), str(tmp_path / "data"))
    assert set(Dataset(str(tmp_path / "data")).read_items()["text"].to_pylist()) == {"Caf\u00e9"}


# --- names of columns ---


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_columns_of_the_item_table_are_mapped(tmp_path: Path, ending: str) -> None:
    rows = {"sku": list(range(6)), "name": [f"N{n}" for n in range(6)], "title": ["other"] * 6, "year": ["1999"] * 6}
    path = tmp_path / f"items.{ending}"
    if ending == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([tuple(rows), *zip(*rows.values(), strict=True)])
    else:
        _ = pq.write_table(pa.table(rows), path) if ending == "parquet" else write_jsonl(path, rows)
    log = write_jsonl(tmp_path / "log.jsonl", log_rows(["u"]) | {"item": [n % 6 for n in range(60)]})
    spec = spec_for(log, path, item="{title} ({year})")
    mapped = spec.source.model_copy(update={"items_columns": {"item": "sku", "title": "name"}})
    prepare(spec.model_copy(update={"source": mapped}), str(tmp_path / "data"))
    table = Dataset(str(tmp_path / "data")).read_items()
    assert sorted(table["text"].to_pylist()) == [f"N{n} (1999)" for n in range(6)]
    assert set(table.column_names) == {"id", "title", "year", "text"}
    for columns, message in (
        ({"item": "SKU"}, "has no column 'SKU'; it has sku, name, title, year: did you mean sku"),
        ({"item": "sku", "title": "Name"}, r"has no column 'Name', .*items_columns names for title; .* did you mean name"),
    ):
        wrong = spec.source.model_copy(update={"items_columns": columns})
        with pytest.raises(InputError, match=message):
            prepare(spec.model_copy(update={"source": wrong}), str(tmp_path / "other"))


def test_items_columns_need_an_item_table() -> None:
    with pytest.raises(ValueError, match="items_columns names columns of an item table, but items is null"):
        SourceSpec(kind="table", path="x", items_columns={"title": "name"})


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_name_in_another_case_is_answered_with_the_right_one(tmp_path: Path, ending: str) -> None:
    rows = {"UserID" if name == "user" else name: column for name, column in log_rows(["u"]).items()}
    path = tmp_path / f"log.{ending}"
    if ending == "csv":
        path.write_text("\n".join([",".join(rows), *(",".join(map(str, row)) for row in zip(*rows.values(), strict=True))]))
    else:
        _ = pq.write_table(pa.table(rows), path) if ending == "parquet" else write_jsonl(path, rows)
    spec = spec_for(path)
    columns = spec.source.columns.model_copy(update={"user": "userid"})
    with pytest.raises(InputError, match=r"has no column 'userid'; .*: did you mean UserID"):
        prepare(spec.model_copy(update={"source": spec.source.model_copy(update={"columns": columns})}), str(tmp_path / "data"))
    with pytest.raises(InputError, match="names the field 'Item', which does not exist; there are item: did you mean item"):
        prepare(
            spec.model_copy(
                update={
                    "source": spec.source.model_copy(update={"columns": columns.model_copy(update={"user": "UserID"})}),
                    "text": TextSpec(item="{Item}"),
                }
            ),
            str(tmp_path / "data"),
        )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"click": 1', '"click": [1]', ", column click: a list is neither a number nor a time"),
        ('"click": 1', '"click": []', ", column click: a list is neither a number nor a time"),
        ('"timestamp": 1', '"timestamp": [1], "rest": 1', ", column timestamp: a list is neither a number nor a time"),
        ('"user": "v"', '"user": "v", "user": "u"', ": the key 'user' is there twice"),
        ('"click": 1', '"click": 0, "click": 1', ": the key 'click' is there twice"),
    ],
)  # fmt: skip
def test_what_might_mean_two_things_is_a_bad_row(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", log_rows(["u", "v"]))
    lines = path.read_text().splitlines()
    assert old in lines[7]
    lines[7] = lines[7].replace(old, new)
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=rf"log\.jsonl, row 8 \(line 8\){re.escape(message)}"):
        prepare(spec_for(path), str(tmp_path / "data"))
    assert prepare(spec_for(path), str(tmp_path / "data"), "skip").skipped_rows == 1


def test_ids_from_another_column_are_not_those_of_a_column_item(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", log_rows(["u"]))
    ids = [f"i{n}" for n in range(6)]
    table = {"sku": ids, "item": ids[::-1], "title": [f"Film {n}" for n in range(6)]}
    items = write_jsonl(tmp_path / "items.jsonl", table)

    def prepared(**columns: str) -> dict[str, str]:
        spec = spec_for(log, items)
        spec = spec.model_copy(update={"source": spec.source.model_copy(update={"items_columns": columns})})
        prepare(spec, str(tmp_path / "data"), overwrite=True)
        held = Dataset(str(tmp_path / "data")).read_items()
        return dict(zip(held["id"].to_pylist(), held["text"].to_pylist(), strict=True))

    assert prepared(item="sku") == dict(zip(ids, table["title"], strict=True))
    assert prepared(item="sku", title="sku") == prepared(title="item") == {name: name for name in ids}
    with pytest.raises(InputError, match=r"takes the ids from 'sku', and title from 'item'.*: rename that column in the table"):
        prepared(item="sku", title="item")


@pytest.mark.parametrize("name", ["id", "text"])
def test_a_template_names_no_column_that_data_sets_have_themselves(tmp_path: Path, name: str) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", log_rows(["u"]))
    items = write_jsonl(tmp_path / "items.jsonl", {"item": [f"i{n}" for n in range(6)], name: [f"Film {n}" for n in range(6)]})
    with pytest.raises(InputError, match=rf"items_columns=\{{my_{name}: {name}\}}"):
        prepare(spec_for(log, items, item=f"{{{name}}}"), str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (pa.array([0, 2**62]).cast(pa.timestamp("ms")), "outside of the years 1 to 9999"),
        (pa.array([0, -(2**62)]).cast(pa.timestamp("us")), "outside of the years 1 to 9999"),
        (pa.array([0, 2**31 - 1], pa.int32()).cast(pa.date32()), "outside of the years 1 to 9999"),
        (pa.array([None, 1]).cast(pa.timestamp("s", "Foo/Bar")), "timezone"),
        (pa.array([None, 2**62], pa.int64()).cast(pa.duration("s")), ""),
        (pa.array([None, {"day": 2**31 - 1}], pa.struct({"day": pa.date32()})), ""),
    ],
    ids=["milliseconds", "microseconds", "days", "zone", "span", "struct"],
)
def test_a_moment_that_no_text_names_is_named_by_its_row(cells: pa.Array, message: str) -> None:
    texts, wrong = column_texts(cells)
    assert texts[1].as_py() is None
    assert list(wrong) == [1]
    assert message in wrong[1]


def test_one_form_of_ids_is_no_reason_to_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", log_rows([5.0, 6.0]))
    prepare(spec_for(path), str(tmp_path / "data"))
    assert users_of(str(tmp_path / "data")) == {"5", "6"}
    assert "ids are written as" not in caplog.text
    path = write_jsonl(tmp_path / "log.jsonl", log_rows([5.0, 6]))
    prepare(spec_for(path), str(tmp_path / "data"), overwrite=True)
    assert "ids are written as 5.0 and as 6" in caplog.text


def test_a_column_of_truth_values_holds_no_ids(tmp_path: Path) -> None:
    pq.write_table(pa.table(log_rows([True, False])), tmp_path / "log.parquet")
    with pytest.raises(InputError, match="column user must hold ids, but it is of type bool"):
        prepare(spec_for(tmp_path / "log.parquet"), str(tmp_path / "data"))


@pytest.mark.filterwarnings("error")
def test_a_label_without_end_is_named_in_a_short_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", log_rows(["u"]))
    path.write_text(path.read_text().replace('"click": 1', f'"click": {"9" * 400}', 1))
    with pytest.raises(InputError, match=r"row 2 \(line 2\), column click: '999") as caught:
        prepare(spec_for(path), str(tmp_path / "data"))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_that_is_not_followed_leaves_nothing_out(tmp_path: Path, target: str) -> None:
    log = tmp_path / "log"
    log.mkdir()
    (tmp_path / "elsewhere").mkdir()
    write_jsonl(log / "a.jsonl", log_rows(["u"]))
    (log / "day=2").symlink_to(tmp_path / target)
    where = {"elsewhere": "to a folder", "nowhere": "nowhere"}[target]
    with pytest.raises(InputError, match=rf"day=2 is a link that leads {where}, and is not followed"):
        prepare(spec_for(log), str(tmp_path / "data"))
    (log / "day=2").rename(log / ".hidden")
    write_jsonl(tmp_path / "b.jsonl", log_rows(["v"]))
    (log / "b.jsonl").symlink_to(tmp_path / "b.jsonl")
    prepare(spec_for(log), str(tmp_path / "data"))
    assert users_of(str(tmp_path / "data")) == {"u", "v"}


@pytest.mark.parametrize("template", ["{item:>9999999999}", "{item:.12345}"])
def test_a_template_makes_no_endless_texts(tmp_path: Path, template: str) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", log_rows(["u"]))
    with pytest.raises(InputError, match="is wider than 999 letters"):
        prepare(spec_for(log, item=template), str(tmp_path / "data"))
