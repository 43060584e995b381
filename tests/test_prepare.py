"""Preparation: equal bytes from equal input, and a data set that reads back or says why not."""

import io
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrsink import storage
from ctrsink.config.data import ColumnSpec, NeighboursSpec, PrepareSpec, SourceSpec, TextSpec, TokenizerSpec
from ctrsink.dataset.manifest import INDEX_SCHEMA, SHARD_SCHEMA, TOKENS_SCHEMA, FileEntry, read_file, read_manifest
from ctrsink.errors import InputError
from ctrsink.prepare import tokenize
from ctrsink.prepare.build import prepare
from ctrsink.prepare.render import feedback_minima, item_texts
from tests.data_fixtures import (
    MOVIES,
    event_rows,
    make_events,
    prepare_spec,
    table_source,
    write_1m,
    write_published_100k,
    write_recbole_100k,
    write_table,
)
from tests.prepared_in_tasks import contents

EVENTS = make_events()


def read_all(uri: str) -> tuple[list[dict], dict[int, list[int]]]:
    """The users of all shards, and the tokens of all items that the shards mention."""
    manifest, users, tokens = read_manifest(uri), [], {}
    for shard in manifest.shards:
        table = pq.read_table(io.BytesIO(read_file(uri, shard.events_file)))
        sidecar = pq.read_table(io.BytesIO(read_file(uri, shard.tokens_file)))
        assert table.schema.equals(SHARD_SCHEMA)
        assert sidecar.schema.equals(TOKENS_SCHEMA)
        rows = table.to_pylist()
        assert (len(rows), sum(len(row["item"]) for row in rows)) == (shard.users, shard.events)
        assert sidecar.column("item").to_pylist() == sorted({item for row in rows for item in row["item"]})
        users += rows
        tokens |= dict(zip(sidecar.column("item").to_pylist(), sidecar.column("tokens").to_pylist(), strict=True))
    return users, tokens


@pytest.mark.parametrize("place", ["local", "s3"])
def test_data_set_holds_the_log(tmp_path: Path, place: str, request: pytest.FixtureRequest) -> None:
    uri = str(tmp_path / "data")
    if place == "s3":
        request.getfixturevalue("s3_server")
        uri = "s3://ctrsink-test/prepared/log"
    manifest = prepare(prepare_spec(SourceSpec(path=str(write_1m(tmp_path / "ml", EVENTS)))), uri)
    assert read_manifest(uri) == manifest
    assert len(manifest.shards) > 2
    assert (manifest.users, manifest.events, manifest.item_count) == (12, len(EVENTS), len(MOVIES))
    tokenizer = tokenize.load_tokenizer(uri)
    assert tokenize.fingerprint(tokenizer) == manifest.tokenizer_fingerprint
    items = pq.read_table(io.BytesIO(read_file(uri, manifest.items))).to_pylist()
    index = pq.read_table(io.BytesIO(read_file(uri, manifest.index)))
    assert index.schema.equals(INDEX_SCHEMA)
    users, tokens = read_all(uri)
    found = []
    for user in users:
        assert user["timestamp"] == sorted(user["timestamp"])
        for item, time, rating, row, label in zip(
            *(user[c] for c in ("item", "timestamp", "feedback", "feedback_id", "label")), strict=True
        ):
            found.append((int(user["user"]), int(items[item]["id"]), int(rating), time))
            assert label == (rating >= 4)
            assert tokenizer.decode(tokens[item]) == items[item]["text"]
            assert tokenizer.decode(list(manifest.feedback_tokens[row])) == f" {rating:g}\n"
    assert sorted(found) == sorted(EVENTS)
    for name, counts in manifest.splits.items():
        assert sum(index.column(f"{name}_impressions").to_pylist()) == counts.impressions
    positives = Counter(label for user in users for label in user["label"])[1]
    assert sum(counts.positives for counts in manifest.splits.values()) == positives


def test_equal_input_gives_equal_bytes_in_any_order_and_layout(tmp_path: Path) -> None:
    shuffled = random.Random(5).sample(EVENTS, len(EVENTS))
    layouts = {
        "published": write_published_100k(tmp_path / "in1", EVENTS),
        "again": tmp_path / "in1",
        "shuffled": write_published_100k(tmp_path / "in2", shuffled),
        "recbole": write_recbole_100k(tmp_path / "in3", EVENTS),
        "1m": write_1m(tmp_path / "in4", EVENTS),
    }
    for name, folder in layouts.items():
        prepare(prepare_spec(SourceSpec(path=str(folder))), str(tmp_path / name))
        assert contents(tmp_path / name) == contents(tmp_path / "published"), name


def test_table_formats_give_equal_data_sets(tmp_path: Path) -> None:
    for ending in ("csv", "jsonl", "parquet"):
        prepare(prepare_spec(table_source(tmp_path, EVENTS, ending)), str(tmp_path / f"data-{ending}"))
    assert contents(tmp_path / "data-csv") == contents(tmp_path / "data-jsonl") == contents(tmp_path / "data-parquet")
    users, _ = read_all(str(tmp_path / "data-csv"))
    for user in users:
        for rating, row, label, time, shown in zip(
            *(user[c] for c in ("feedback", "feedback_id", "label", "timestamp", "request")), strict=True
        ):
            assert (rating is None) == (label is None) == (row == 0)
            assert shown == f"r{time % 5}"


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_blank_request_is_none(tmp_path: Path, ending: str) -> None:
    blanks = {0: "", 1: "  ", 2: None}
    rows = event_rows(EVENTS)
    for number, row in enumerate(rows):
        row["shown"] = blanks.get(number % 4, f"r{number}")
    source = table_source(tmp_path, EVENTS, ending)
    write_table(Path(source.path), rows)
    prepare(prepare_spec(source), str(tmp_path / "data"))
    users, _ = read_all(str(tmp_path / "data"))
    found = Counter(shown for user in users for shown in user["request"])
    assert found == Counter(None if number % 4 in blanks else f"r{number}" for number in range(len(rows)))


def test_tokens_are_cut_and_prefixed(tmp_path: Path) -> None:
    spec = prepare_spec(table_source(tmp_path, EVENTS))
    text = TextSpec(item="{title}", max_item_tokens=3, prefix="Likes:", feedback="", separator="")
    manifest = prepare(spec.model_copy(update={"text": text}), str(tmp_path / "data"))
    _, tokens = read_all(str(tmp_path / "data"))
    assert max(len(t) for t in tokens.values()) == 3
    assert tokenize.load_tokenizer(str(tmp_path / "data")).decode(list(manifest.prefix_tokens)) == "Likes:"
    assert manifest.feedback_tokens == ((),)


def test_a_data_set_is_replaced_only_when_asked(tmp_path: Path) -> None:
    source = table_source(tmp_path, EVENTS)
    to = str(tmp_path / "data")
    prepare(prepare_spec(source, shard_events=10), to)
    before = contents(tmp_path / "data")
    with pytest.raises(InputError, match=r"holds a data set already.*--overwrite"):
        prepare(prepare_spec(source), to)
    assert contents(tmp_path / "data") == before
    prepare(prepare_spec(source), to, overwrite=True)
    prepare(prepare_spec(source), str(tmp_path / "fresh"))
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def change_tokenizer(spec: PrepareSpec, **values: object) -> PrepareSpec:
    return spec.model_copy(update={"tokenizer": TokenizerSpec.model_validate(values)})


def test_tokenizer_of_a_model_folder(tmp_path: Path, s3_server) -> None:
    spec = prepare_spec(table_source(tmp_path, EVENTS))
    first = prepare(spec, str(tmp_path / "first"))
    second = prepare(change_tokenizer(spec, path=str(tmp_path / "first" / "tokenizer")), str(tmp_path / "second"))
    assert second.tokenizer_fingerprint == first.tokenizer_fingerprint
    storage.upload_dir(tmp_path / "first" / "tokenizer", "s3://ctrsink-test/a-model")
    third = prepare(change_tokenizer(spec, path="s3://ctrsink-test/a-model"), str(tmp_path / "from-s3"))
    assert third.tokenizer_fingerprint == first.tokenizer_fingerprint
    with pytest.raises(InputError, match="s3://ctrsink-test/no-model does not exist"):
        prepare(change_tokenizer(spec, path="s3://ctrsink-test/no-model"), str(tmp_path / "third"))
    other = prepare(change_tokenizer(spec, train_vocabulary=310), str(tmp_path / "other"))
    assert other.tokenizer_fingerprint != first.tokenizer_fingerprint
    with pytest.raises(InputError, match=r"cannot load the tokenizer .*nothing-here"):
        prepare(change_tokenizer(spec, path=str(tmp_path / "nothing-here")), str(tmp_path / "third"))
    assert not (tmp_path / "third").exists()


def test_bos_starts_the_prefix_where_the_tokenizer_puts_one(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    plain = tokenize.make_tokenizer(TokenizerSpec(train_vocabulary=300), ["some text"])
    assert tokenize.prefix_tokens(plain, "") == []
    plain.add_special_tokens({"bos_token": "<s>"})
    bos = plain.convert_tokens_to_ids("<s>")
    assert tokenize.prefix_tokens(plain, "x") == tokenize.encode(plain, ["x"])[0]
    plain.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert tokenize.prefix_tokens(plain, "x") == [bos, *tokenize.encode(plain, ["x"])[0]]


def test_fingerprint_sees_rules_as_well_as_vocabulary() -> None:
    from tokenizers.normalizers import Lowercase

    texts = ["some text of Words", "more text"]
    first, second = (tokenize.make_tokenizer(TokenizerSpec(train_vocabulary=280 + 20), texts) for _ in range(2))
    assert tokenize.fingerprint(first) == tokenize.fingerprint(second)
    second.backend_tokenizer.normalizer = Lowercase()
    assert tokenize.fingerprint(first) != tokenize.fingerprint(second)


def test_damaged_files_are_found(tmp_path: Path) -> None:
    to = tmp_path / "data"
    spec = prepare_spec(table_source(tmp_path, EVENTS)).model_copy(update={"neighbours": NeighboursSpec()})
    manifest = prepare(spec, str(to))
    entries: list[FileEntry] = [*manifest.common_files]
    entries += [entry for shard in manifest.shards for entry in (shard.events_file, shard.tokens_file)]
    assert sorted([*(e.path for e in entries), "manifest.json"]) == sorted(contents(to))
    for entry in entries:
        path, content = to / entry.path, (to / entry.path).read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(InputError, match=f"{entry.path}.*truncated"):
            read_file(str(to), entry)
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{entry.path}.*altered"):
            read_file(str(to), entry)
        path.unlink()
        with pytest.raises(InputError, match=f"{entry.path} is missing"):
            read_file(str(to), entry)
        path.write_bytes(content)
        assert read_file(str(to), entry) == content


def test_damaged_manifest_is_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no manifest.json"):
        read_manifest(str(tmp_path))
    for content in ("", "{", "{}", '{"format": "other"}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(InputError, match=r"manifest.json is damaged"):
            read_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            {"item": "{name}"},
            "text.item '{name}' names the field 'name', which does not exist; there are item, title, year, genres",
        ),
        ({"item": "{title.upper}"}, "names the field 'title.upper'"),
        ({"item": "{title"}, "text.item '{title' is no template"),
        ({"item": "{title:d}"}, "text.item '{title:d}' cannot be filled in"),
        ({"item": "{year}"}, "the text of item 'i6' is empty"),
        ({"feedback": "{rating}"}, "text.feedback '{rating}' names the field 'rating', which does not exist; there are feedback"),
    ],
)
def test_wrong_template_is_named(tmp_path: Path, text: dict[str, str], message: str) -> None:
    spec = prepare_spec(table_source(tmp_path, EVENTS)).model_copy(update={"text": TextSpec.model_validate(text)})
    with pytest.raises(InputError, match=message.replace("{", r"\{")):
        prepare(spec, str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_too_many_feedback_texts() -> None:
    with pytest.raises(InputError, match=r"4099 different texts .* more than 4096: use a coarser format"):
        feedback_minima(TextSpec(), np.arange(4098, dtype=np.float32))


def test_item_fields_are_filled_in() -> None:
    items = pa.table({"item": ["a", "b"], "title": ["X", "Y"]})
    assert item_texts("{item}: {title} {{}}", items) == ["a: X {}", "b: Y {}"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(1, 5.0)] * 20, "the train split has no impression"),
        ([(t, 5.0) for t in range(20)], "all 14 impressions of the train split are positive"),
        ([(t, 1.0) for t in range(20)], "all 14 impressions of the train split are negative"),
        ([(t, None) for t in range(20)], "no event of .* has a label"),
    ],
)
def test_log_that_cannot_be_split(tmp_path: Path, rows: list[tuple[int, float | None]], message: str) -> None:
    table: list[dict[str, object]] = [{"user": "u", "item": "a", "timestamp": t, "stars": stars} for t, stars in rows]
    log = write_table(tmp_path / "log.csv", table)
    source = SourceSpec(kind="table", path=str(log), columns=ColumnSpec(feedback="stars"))
    spec = prepare_spec(source).model_copy(update={"text": TextSpec(item="{item}")})
    with pytest.raises(InputError, match=message):
        prepare(spec, str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_missing_bucket_is_told_before_the_log_is_read(s3_server) -> None:
    with pytest.raises(InputError, match="the bucket no-such-bucket does not exist"):
        prepare(prepare_spec(SourceSpec(path="nowhere")), "s3://no-such-bucket/data")


def test_skipped_rows_are_counted(tmp_path: Path) -> None:
    folder = write_1m(tmp_path / "ml", EVENTS)
    with (folder / "ratings.dat").open("a") as file:
        file.write("1::1::x::5\n1::99::1::5\n")
    spec = prepare_spec(SourceSpec(path=str(folder)))
    with pytest.raises(InputError, match=r"ratings\.dat, row 109"):
        prepare(spec, str(tmp_path / "data"))
    manifest = prepare(spec, str(tmp_path / "data"), on_bad_row="skip")
    assert (manifest.events, manifest.skipped_rows) == (len(EVENTS), 2)
