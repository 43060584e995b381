"""One value is one text: in csv, jsonl, Parquet and requests; what is no text or no id is named, never guessed."""

import csv
import datetime
import decimal
import json
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.config.data import SourceSpec, TextSpec
from ctrsink.dataset.reader import Dataset
from ctrsink.dataset.values import column_texts, text
from ctrsink.errors import InputError
from ctrsink.export.package import export_run
from ctrsink.prepare.build import prepare
from ctrsink.prepare.items import Items
from ctrsink.prepare.render import item_texts
from ctrsink.prepare.sources import open_source
from ctrsink.serve import Scorer, request_of, score_file
from ctrsink.serve.requests import item_table, parse_request
from tests.serving_fixtures import Prepared, run_spec, write_run
from tests.value_fixtures import SHOP, log_rows, shop_items, spec_for, write_jsonl

TEMPLATE = TextSpec(item="{value}|")


def prepared_texts(path: Path) -> list[str]:
    """The texts of an item table's rows, as preparation renders them."""
    source = open_source(SourceSpec(kind="table", path="-", items=str(path)), ["value"])
    items = source.items()
    assert items is not None
    return Items.of(items, TEMPLATE).table.column("text").to_pylist()


def request_texts(values: list[Any]) -> list[str]:
    """The same of a request's candidates."""
    tree = {"candidates": [{"value": value} for value in values], "timestamp": 0}
    return item_texts(TEMPLATE.item, item_table(parse_request(tree, ["value"], "request").candidates, ["value"]))


def jsonl(folder: Path, literals: list[str]) -> Path:
    path = folder / "items.jsonl"
    path.write_text("".join(f'{{"item": "i{n}", "value": {literal}}}\n' for n, literal in enumerate(literals)), "utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For one file after another of the same name."""
    return tmp_path_factory.mktemp("values")


letters = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)
written = st.from_regex(r"-?(0|[1-9][0-9]{0,20})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,2})?", fullmatch=True)
words = st.one_of(letters, written, st.sampled_from(["True", "false", "NaN", "None", "e\u0301", "007", "1.10", " 2.0"]))
numbers = st.one_of(st.integers(-(10**25), 10**25), st.floats(allow_infinity=False))
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
values = st.one_of(scalars, st.lists(st.one_of(scalars, st.lists(scalars, max_size=3)), max_size=3))


@given(given=st.lists(values, min_size=1, max_size=4))
@settings(max_examples=60)
def test_a_json_value_is_one_text_in_preparation_and_request(folder: Path, given: list[Any]) -> None:
    found = prepared_texts(jsonl(folder, [json.dumps(value) for value in given]))
    assert found == request_texts([json.loads(json.dumps(value)) for value in given])
    assert found == request_texts(given)


@given(literals=st.lists(written.filter(lambda number: math.isfinite(float(number))), min_size=1, max_size=4))
@settings(max_examples=40)
def test_a_number_is_one_text_however_it_is_written(folder: Path, literals: list[str]) -> None:
    expected = request_texts([json.loads(literal) for literal in literals])
    assert prepared_texts(jsonl(folder, literals)) == expected
    with (folder / "items.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("item", "value"), *((f"i{n}", literal) for n, literal in enumerate(literals))])
    assert prepared_texts(folder / "items.csv") == expected
    assert request_texts(literals) == expected


@given(given=st.lists(st.one_of(st.none(), st.booleans(), numbers.filter(lambda n: n == n), words), min_size=1, max_size=4))
@settings(max_examples=40)
def test_a_cell_of_a_csv_file_is_one_text_with_the_value_it_was_written_from(folder: Path, given: list[Any]) -> None:
    path = folder / "items.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("item", "value"), *((f"i{n}", v) for n, v in enumerate(given))])
    assert prepared_texts(path) == request_texts(given)


columns = st.one_of(
    st.tuples(st.just(pa.float64()), st.lists(st.one_of(st.none(), st.floats(allow_infinity=False)), min_size=1, max_size=3)),
    st.tuples(st.just(pa.float32()), st.lists(st.floats(allow_infinity=False, width=32), min_size=1, max_size=3)),
    st.tuples(st.just(pa.int64()), st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=3)),
    st.tuples(st.just(pa.bool_()), st.lists(st.one_of(st.none(), st.booleans()), min_size=1, max_size=3)),
    st.tuples(st.just(pa.string()), st.lists(st.one_of(st.none(), words), min_size=1, max_size=3)),
    st.tuples(st.just(pa.binary()), st.lists(words.map(str.encode), min_size=1, max_size=3)),
    st.tuples(st.just(pa.decimal128(12, 4)), st.lists(st.decimals(-(10**6), 10**6, places=4), min_size=1, max_size=3)),
    st.tuples(st.just(pa.date32()), st.lists(st.dates(), min_size=1, max_size=3)),
    st.tuples(st.just(pa.timestamp("us")), st.lists(st.datetimes(), min_size=1, max_size=3)),
    st.tuples(
        st.just(pa.list_(pa.list_(pa.float64()))),
        st.lists(st.lists(st.lists(st.floats(allow_infinity=False), max_size=3), max_size=3), min_size=1, max_size=3),
    ),
    st.tuples(
        st.just(pa.list_(pa.string())), st.lists(st.one_of(st.none(), st.lists(words, max_size=3)), min_size=1, max_size=3)
    ),
)


@given(column=columns)
@settings(max_examples=60)
def test_a_typed_value_is_one_text_with_the_object_that_it_is_in_python(
    folder: Path, column: tuple[pa.DataType, list[Any]]
) -> None:
    kind, given = column
    path = folder / "items.parquet"
    pq.write_table(pa.table({"item": [f"i{n}" for n in range(len(given))], "value": pa.array(given, kind)}), path)
    asked = [np.float32(value) for value in given] if kind == pa.float32() else given
    assert prepared_texts(path) == request_texts(asked)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (6.50, "6.5"), (1e1, "10"), (-0.0, "0"), (1e20, "100000000000000000000"), (1e21, "1e+21"), (1e-7, "1e-07"),
        (True, "true"), (None, None), (math.nan, None), ([6.50, True, None, [math.nan, "a b"]], "6.5 true a b"), ([], ""),
        (np.float32(6.1), "6.1"), (np.array([6.1, np.nan], np.float32), "6.1"),
        (np.int64(7), "7"), (np.array([1.0, 2.5]), "1 2.5"), (decimal.Decimal("6.50"), "6.5"),
        (datetime.date(1995, 3, 1), "1995-03-01"), (datetime.datetime(1995, 3, 1, 2, 3), "1995-03-01 02:03:00"),
        ("caf\u00e9".encode(), "caf\u00e9"), ((1, "x"), "1 x"), (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    ],
)  # fmt: skip
def test_the_text_of_a_value(value: Any, expected: str | None) -> None:
    assert text(value) == expected


@pytest.mark.parametrize(
    "value",
    [{"a": 1}, [{"a": 1}], math.inf, "half \ud83d", b"caf\xe9", object(), 10**5000, {1, 2}],
    ids=lambda v: type(v).__name__,
)
def test_what_has_no_text_is_refused_with_the_reason(value: Any) -> None:
    with pytest.raises(ValueError, match=r"is no text|is half a surrogate pair|are no UTF-8|not a finite number|too many digits"):
        text(value)
    with pytest.raises(InputError, match=r"request: candidates\.0\.value: "):
        request_texts([value])


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([{"a": 1}, None]),
        pa.array([[(1, 2)], None], pa.map_(pa.int8(), pa.int8())),
        pa.array([[{"a": 1}], None]),
        pa.array([b"caf\xe9", None]),
        pa.StringArray.from_buffers(2, *pa.array([b"caf\xe9", b""]).buffers()[1:]),
        pa.array([datetime.timedelta(1), None]),
        pa.array([math.inf, None]),
    ],
    ids=lambda cells: str(cells.type),
)
def test_a_typed_cell_that_is_no_text_is_named(cells: pa.Array) -> None:
    texts, wrong = column_texts(cells)
    assert set(wrong) == {0}
    assert texts[0].as_py() is None


def exported_shop(folder: Path, item: str) -> list[dict[str, Any]]:
    """Data, and a model of them, in `folder`; returns what shop_items does."""
    clients = shop_items(folder / "shop.jsonl")
    spec = spec_for(write_jsonl(folder / "log.jsonl", log_rows(["u0", "u1", "u2"])), folder / "shop.jsonl", item=item)
    prepare(spec, str(folder / "data"))
    run = run_spec(Prepared(str(folder / "data"), spec), str(folder / "run"))
    write_run(run)
    export_run(run.run_dir, str(folder / "model"))
    return clients


def test_the_values_of_a_shop_score_as_they_were_trained(tmp_path: Path) -> None:
    clients = exported_shop(tmp_path, "{title} for {price} {tags} {vegan}")
    dataset, scorer = Dataset(str(tmp_path / "data")), Scorer.load(str(tmp_path / "model"))
    assert dataset.read_items()["text"].to_pylist()[:4:3] == ["Tea, loose for 6.5 6.5 true true", "Spoon for 10 10 true true"]
    order = [int(name[1:]) for name in dataset.read_items()["id"].to_pylist()]
    prepared = request_of(dataset, 0, 9, list(range(len(SHOP))))
    numbers = {item["id"]: number for number, item in enumerate(prepared["candidates"])}
    history = [b | {"item": clients[order[numbers[b["item"]["id"]]]]} for b in prepared["history"]]
    asked = prepared | {"history": history, "candidates": [clients[number] for number in order]}
    assert scorer.score(asked) == scorer.score(json.loads(json.dumps(asked))) == scorer.score(prepared)
    assert len(set(scorer.score(asked))) == len(SHOP)


# --- requests ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    exported_shop(folder, "{title} {price}")
    return str(folder / "model")


def bad(**fields: Any) -> dict[str, Any]:
    return {"candidates": [{"title": "A", "price": 1} | fields], "timestamp": 5}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps(bad(title="A \ud83d")), r"candidates\.0\.title: '\\ud83d' is half a surrogate pair"),
        ('{"candidates": [{"title": "A", "price": 1e999}], "timestamp": 5}', r"candidates\.0\.price: inf is not a finite number"),
        (json.dumps(bad(price={"eur": 1})), r"candidates\.0\.price: an object is no text"),
        (json.dumps(bad() | {"\ud83d": 1}), "unicode"),
        ("[" * 100_000, "not a JSON object"),
        (f'{{"candidates": [{{"title": "A", "price": {"9" * 5000}}}], "timestamp": 5}}', "not a JSON object"),
        ('{"candidates": [{"Title": "A", "price": 1}], "timestamp": 5}', "no field 'title', .* did you mean Title"),
        ('{"candidates": [{"title": "A", "price": 1, "title": "B"}], "timestamp": 5}', "the key 'title' is there twice"),
    ],
    ids=["surrogate", "infinite", "object", "key", "nested", "digits", "case", "twice"],
)  # fmt: skip
def test_a_request_that_holds_no_text_is_named_by_its_line(model: str, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "requests.jsonl").write_text(f"{json.dumps(bad())}\n{line}\n")
    with pytest.raises(InputError, match=rf"requests\.jsonl, line 2: .*{message}") as caught:
        score_file(model, str(tmp_path / "requests.jsonl"), str(tmp_path / "out.jsonl"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_python_objects_are_scored_as_the_json_that_they_are(model: str) -> None:
    scorer = Scorer.load(model)
    expected = scorer.score(bad(price=6.5))
    price: Callable[[Any], list[float]] = lambda value: scorer.score(bad(price=value))  # noqa: E731
    for value in (np.float32(6.5), np.float64(6.5), decimal.Decimal("6.50"), "6.50", b"6.5", [6.5], (6.5,), np.array([6.5])):
        assert price(value) == expected
    assert price(None) == price(math.nan) == price([]) != expected
    assert price(True) == price(np.bool_(True)) == price("True") != expected


def test_an_item_without_any_text_is_named_whatever_else_it_holds(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    log = write_jsonl(tmp_path / "log.jsonl", log_rows(["u"]))
    shop_items(tmp_path / "shop.jsonl")
    spec = spec_for(log, tmp_path / "shop.jsonl")
    prepare(spec, str(tmp_path / "data"))
    run = run_spec(Prepared(str(tmp_path / "data"), spec), str(tmp_path / "run"))
    write_run(run)
    export_run(run.run_dir, str(folder))
    with pytest.raises(InputError, match=r'request: the text of the item \{"title": ""\} is empty'):
        Scorer.load(str(folder)).score({"candidates": [{"title": math.nan, "picture": object()}], "timestamp": 5})
