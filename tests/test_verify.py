"""`ctrsink data verify`: a whole data set passes, every way in which a file can be wrong is named with the file."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from cluster.local.seaweed import SeaweedServer
from ctrsink import storage
from ctrsink.config.data import ColumnSpec, PrepareSpec, SourceSpec, TokenizerSpec
from ctrsink.dataset.manifest import Manifest, read_manifest
from ctrsink.prepare.build import append, prepare
from ctrsink.prepare.synth import synth
from tests.builders import make_dataset
from tests.command_line import Result, call, content, good, refused
from tests.conftest import BUCKET


@pytest.fixture
def data(tmp_path: Path) -> str:
    return make_dataset(tmp_path)


def change_manifest(uri: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Apply `change` to the manifest as a tree."""
    tree = read_manifest(uri).model_dump(mode="json")
    change(tree)
    storage.write_bytes(f"{uri}/manifest.json", Manifest.model_validate(tree).model_dump_json().encode())


def rewrite(uri: str, path: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace a table by a changed one and let the manifest have its hash: wrong in itself, but not damaged."""
    table = change(pq.read_table(io.BytesIO(storage.read_bytes(f"{uri}/{path}"))))
    pq.write_table(table, f"{uri}/{path}")
    written = Path(uri, path).read_bytes()

    def enter(tree: dict[str, Any]) -> None:
        files = [tree["index"], tree["items"], *(s[name] for s in tree["shards"] for name in ("events_file", "tokens_file"))]
        (entry,) = [file for file in files if file["path"] == path]
        entry |= {"bytes": len(written), "sha256": storage.sha256(written)}

    change_manifest(uri, enter)


def replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def in_lists(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    """Change the list of a column in the first row with at least three events."""

    def apply(table: pa.Table) -> pa.Table:
        rows = table[name].to_pylist()
        at = next(i for i, row in enumerate(rows) if len(row) >= 3)
        rows[at] = change(rows[at])
        return replaced(table, name, rows)

    return apply


def lines(result: Result, kind: str) -> list[str]:
    return [line for line in result.out.splitlines() if line.startswith(f"{kind}: ")]


def test_a_whole_data_set_passes_and_is_not_touched(data: str) -> None:
    before = content(Path(data))
    result = good("data", "verify", data)
    manifest = read_manifest(data)
    files = [path for path in Path(data).rglob("*") if path.is_file()]
    assert result["files"] == len(files)
    assert result["bytes"] == sum(path.stat().st_size for path in files if path.name != "manifest.json")
    assert (result["shards"], result["events"]) == (len(manifest.shards), manifest.events)
    assert content(Path(data)) == before
    assert lines(call("data", "verify", data), "remark") == []


def test_every_damaged_file_has_its_line_and_the_rest_is_checked_all_the_same(data: str) -> None:
    shards = read_manifest(data).shards
    cut, flipped, gone = shards[0].events_file.path, shards[1].tokens_file.path, shards[2].events_file.path
    whole = Path(data, cut).read_bytes()
    Path(data, cut).write_bytes(whole[:-5])
    bits = bytearray(Path(data, flipped).read_bytes())
    bits[len(bits) // 2] ^= 1
    Path(data, flipped).write_bytes(bits)
    Path(data, gone).unlink()
    result = call("data", "verify", data)
    total = len(read_manifest(data).common_files) + 1 + 2 * len(shards)
    refused(result, f"3 of {total} files are bad: {cut}, {flipped}, {gone}; ")
    bad = lines(result, "bad")
    assert len(bad) == 3
    assert bad[0].startswith(f"bad: {data}/{cut}: has {len(whole) - 5} bytes, the manifest says {len(whole)}")
    assert bad[1].startswith(f"bad: {data}/{flipped}: does not match the sha256")
    assert bad[2].startswith(f"bad: {data}/{gone}: is missing")
    asked = call("data", "verify", data, "--json")
    assert asked.code == asked.json["exit_code"] == 2
    assert asked.json["error"].startswith(f"3 of {total} files are bad")


@pytest.mark.parametrize("which", ["index", "items", "tokenizer"])
def test_files_beside_the_shards_are_checked(data: str, which: str) -> None:
    manifest = read_manifest(data)
    entry = {"index": manifest.index, "items": manifest.items, "tokenizer": manifest.tokenizer[0]}[which]
    Path(data, entry.path).write_bytes(b"x" * entry.bytes)
    result = call("data", "verify", data)
    refused(result, f"1 of {len(manifest.common_files) + 1 + 2 * len(manifest.shards)} files are bad: {entry.path};")
    assert [line.split(": ")[1] for line in lines(result, "bad")] == [f"{data}/{entry.path}"]


def test_many_bad_files_are_counted_in_the_summary(data: str) -> None:
    for shard in read_manifest(data).shards[:4]:
        Path(data, shard.events_file.path).unlink()
        Path(data, shard.tokens_file.path).unlink()
    result = call("data", "verify", data)
    assert " and 3 more; " in refused(result, "8 of ")
    assert len(lines(result, "bad")) == 8


SPOILT_SHARDS: list[tuple[str, Callable[[pa.Table], pa.Table], str]] = [
    ("order", in_lists("timestamp", lambda times: times[::-1]), "that are not in order of time"),
    ("split", in_lists("timestamp", lambda times: [times[-1] + 10**8] * len(times)), "has other events of user"),
    ("label", in_lists("label", lambda labels: [None] * len(labels)), "has other impressions of user"),
    ("value", in_lists("label", lambda labels: [2] * len(labels)), "has label 2, it must be from 0 to 1"),
    ("item", in_lists("item", lambda items: [-1, *items[1:]]), "has item -1, it must be from 0 to 8"),
    ("feedback", in_lists("feedback_id", lambda ids: [999, *ids[1:]]), "has feedback_id 999, it must be from 0 to"),
    ("null", in_lists("timestamp", lambda times: [None, *times[1:]]), "has an event without timestamp"),
    ("lists", in_lists("request", lambda requests: requests[1:]), "has a user whose lists are not equally long"),
    ("twice", lambda table: replaced(table, "user", [table["user"][0].as_py()] * table.num_rows), "has a user twice"),
    ("stranger", lambda table: replaced(table, "user", [f"v{i}" for i in range(table.num_rows)]), "belongs to another shard"),
    ("users", lambda table: table.slice(1), "users, the manifest says"),
    ("columns", lambda table: table.drop_columns(["request"]), "has the columns user: string"),
]


@pytest.mark.parametrize(("change", "reason"), [case[1:] for case in SPOILT_SHARDS], ids=[case[0] for case in SPOILT_SHARDS])
def test_a_shard_that_disagrees_with_the_index_is_named(data: str, change: Any, reason: str) -> None:
    path = read_manifest(data).shards[1].events_file.path
    rewrite(data, path, change)
    result = call("data", "verify", data)
    refused(result, f"files are bad: {path}; ")
    (line,) = lines(result, "bad")
    assert line.startswith(f"bad: {data}/{path}: ")
    assert reason in line


SPOILT_TOKENS: list[tuple[str, Callable[[pa.Table], pa.Table], str]] = [
    ("missing", lambda table: table.slice(1), "lacks 1 items that its shard mentions, the first of them item "),
    ("order", lambda table: table.take(list(range(table.num_rows))[::-1]), "does not list each item once, in ascending order"),
    ("empty", lambda table: replaced(table, "tokens", [[]] * table.num_rows), "has no token for item "),
]


@pytest.mark.parametrize(("change", "reason"), [case[1:] for case in SPOILT_TOKENS], ids=[case[0] for case in SPOILT_TOKENS])
def test_tokens_that_do_not_serve_their_shard_are_named(data: str, change: Any, reason: str) -> None:
    path = read_manifest(data).shards[1].tokens_file.path
    rewrite(data, path, change)
    result = call("data", "verify", data)
    refused(result, f"files are bad: {path}; ")
    assert reason in lines(result, "bad")[0]


SPOILT_INDEXES: list[tuple[str, Callable[[pa.Table], pa.Table], str]] = [
    ("short", lambda table: table.slice(0, table.num_rows - 1), "does not list the users of each shard"),
    ("rows", lambda table: replaced(table, "row", [0] * table.num_rows), "does not list the rows of each shard"),
    ("null", lambda table: replaced(table, "test_events", [None] * table.num_rows), "has an empty cell"),
]


@pytest.mark.parametrize(("change", "reason"), [case[1:] for case in SPOILT_INDEXES], ids=[case[0] for case in SPOILT_INDEXES])
def test_an_index_that_disagrees_with_the_manifest_is_named(data: str, change: Any, reason: str) -> None:
    rewrite(data, "index.parquet", change)
    result = call("data", "verify", data)
    refused(result, "files are bad: index.parquet; ")
    assert reason in lines(result, "bad")[0]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("events", "events (its shards: 131)"),
        ("users", "users (its shards: 14)"),
        ("last_time", "as last time (its shards: "),
    ],
)
def test_a_manifest_that_counts_otherwise_than_its_shards_is_named(data: str, key: str, reason: str) -> None:
    change_manifest(data, lambda tree: tree["parts"][0].update({key: tree["parts"][0][key] + 1}))
    result = call("data", "verify", data)
    refused(result, "files are bad: manifest.json; ")
    assert reason in lines(result, "bad")[0]


def test_positives_and_parts_of_the_manifest_are_checked(data: str) -> None:
    before = storage.read_bytes(f"{data}/manifest.json")
    change_manifest(data, lambda tree: tree["parts"][0]["splits"]["train"].update(positives=1))
    assert "1 positives in train (its shards: " in lines(call("data", "verify", data), "bad")[0]
    storage.write_bytes(f"{data}/manifest.json", before)
    change_manifest(data, lambda tree: tree["shards"][2].update(part=3))
    refused(call("data", "verify", data), "1 of ", "files are bad: manifest.json")
    storage.write_bytes(f"{data}/manifest.json", before)
    rewrite(data, "items.parquet", lambda table: table.slice(1))
    assert "has 8 items, the manifest says 9" in lines(call("data", "verify", data), "bad")[0]


def test_past_events_belong_to_an_earlier_part(data: str) -> None:
    """Events that the index calls past count for no split, and are history in order of time like all others."""

    def shift(table: pa.Table) -> pa.Table:
        train = table["train_events"].to_numpy()
        moved = np.where(train > 0, 1, 0)
        return replaced(replaced(table, "past_events", moved), "train_events", train - moved)

    rewrite(data, "index.parquet", shift)
    result = call("data", "verify", data)
    refused(result, "files are bad")
    assert all("in past than the index counts" in line for line in lines(result, "bad"))


def test_a_data_set_that_was_appended_to_is_whole_and_its_users_count_once(tmp_path: Path) -> None:
    synth(str(tmp_path / "log"), 4_000, file_events=2_000)
    old, new = (csv.read_csv(tmp_path / "log" / "events" / f"part-0000{number}.csv") for number in (0, 1))
    new = new.filter(pa.array(new["timestamp"].to_numpy() > old["timestamp"].to_numpy().max()))
    specs = []
    for name, table in (("old", old), ("new", new)):
        csv.write_csv(table, tmp_path / f"{name}.csv")
        specs.append(
            PrepareSpec(
                source=SourceSpec(
                    kind="table",
                    path=str(tmp_path / f"{name}.csv"),
                    items=str(tmp_path / "log" / "items.csv"),
                    columns=ColumnSpec(feedback="click", label="click"),
                ),
                tokenizer=TokenizerSpec(train_vocabulary=300),
                shard_events=500,
            )
        )
    uri = str(tmp_path / "data")
    prepare(specs[0], uri)
    append(specs[1], uri)
    assert good("data", "verify", uri)["events"] == old.num_rows + new.num_rows
    summary = good("data", "inspect", uri)
    users = set(old["user"].to_pylist()) | set(new["user"].to_pylist())
    assert (summary["users"], summary["events"]) == (len(users), old.num_rows + new.num_rows)
    assert summary["chronologies"] > len(users)
    assert sum(split["impressions"] for split in summary["parts"][1]["splits"].values()) == new.num_rows


def test_other_files_are_a_remark(data: str) -> None:
    Path(data, "shards", "old.parquet").write_bytes(b"x")
    Path(data, "notes.txt").write_bytes(b"x")
    result = call("data", "verify", data)
    assert result.code == 0
    assert lines(result, "remark") == [
        f"remark: {data}/notes.txt is no part of the data set",
        f"remark: {data}/shards/old.parquet is no part of the data set",
    ]


def test_on_s3(data: str, s3_server: SeaweedServer) -> None:
    uri = f"s3://{BUCKET}/verified"
    storage.upload_dir(data, uri)
    assert good("data", "verify", uri) == good("data", "verify", data) | {"data": uri}
    shards = read_manifest(uri).shards
    storage.delete(f"{uri}/{shards[3].tokens_file.path}")
    other = storage.read_bytes(f"{uri}/{shards[1].events_file.path}")
    storage.write_bytes(f"{uri}/{shards[0].events_file.path}", other)
    result = call("data", "verify", uri)
    refused(result, f"2 of {len(read_manifest(uri).common_files) + 1 + 2 * len(shards)} files are bad: ")
    assert [line.split(": ")[1] for line in lines(result, "bad")] == [
        f"{uri}/{shards[0].events_file.path}",
        f"{uri}/{shards[3].tokens_file.path}",
    ]


def test_no_manifest(tmp_path: Path) -> None:
    refused(call("data", "verify", tmp_path), "holds no manifest.json")
