"""`ctrsink data inspect`: every figure against a plain count over the rows of the shards, and pictures that are drawn."""

import struct
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.local.seaweed import SeaweedServer
from ctrsink import storage
from ctrsink.dataset.inspect import HISTORIES, Counts, distribution, inspect, summarise
from ctrsink.dataset.manifest import SPLITS, read_manifest
from ctrsink.prepare.build import append, prepare
from tests.builders import make_dataset
from tests.command_line import call, good, refused
from tests.conftest import BUCKET
from tests.data_fixtures import make_events, prepare_spec, table_source
from tests.prepared_in_tasks import HALF, ROWS, spec_of, write_log


@dataclass(frozen=True)
class Event:
    """One event of a chronology as a shard has it."""

    user: str
    item: int
    time: int
    feedback: int
    label: int | None
    request: str | None


def chronologies(uri: str) -> list[list[Event]]:
    manifest = read_manifest(uri)
    found = []
    for shard in manifest.shards:
        for row in pq.read_table(f"{uri}/{shard.events_file.path}").to_pylist():
            columns = (row[name] for name in ("item", "timestamp", "feedback_id", "label", "request"))
            found.append([Event(row["user"], *event) for event in zip(*columns, strict=True)])
    return found


def tokens_of(uri: str) -> dict[int, list[int]]:
    tables = [pq.read_table(f"{uri}/{shard.tokens_file.path}") for shard in read_manifest(uri).shards]
    return {row["item"]: row["tokens"] for table in tables for row in table.to_pylist()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("inspect"), users=30, shard_events=60)


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set whose impressions share requests, some of them with others of their user in between."""
    folder = tmp_path_factory.mktemp("requests")
    prepare(prepare_spec(table_source(folder, make_events())), str(folder / "data"))
    return str(folder / "data")


def test_counts_are_those_of_the_rows(data: str) -> None:
    summary, rows = good("data", "inspect", data), chronologies(data)
    events = [event for row in rows for event in row]
    impressions = [event for event in events if event.label is not None]
    assert (summary["events"], summary["users"], summary["chronologies"]) == (len(events), len(rows), len(rows))
    assert summary["splits"]["all"] == {
        "events": len(events),
        "impressions": len(impressions),
        "positives": sum(event.label == 1 for event in impressions),
        "label_rate": sum(event.label == 1 for event in impressions) / len(impressions),
    }
    (part,) = summary["parts"]
    times = read_manifest(data).split_times
    for at, name in enumerate(SPLITS):
        inside = [e for e in events if np.searchsorted([times.train_end, times.valid_end], e.time, side="right") == at]
        assert part["splits"][name]["events"] == summary["splits"][name]["events"] == len(inside)
        assert summary["splits"][name]["positives"] == sum(event.label == 1 for event in inside)
    assert part["splits"]["valid"]["from"] == datetime.fromtimestamp(times.train_end, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    shown = sorted(Counter(event.item for event in events).values(), reverse=True)
    assert summary["popularity"]["top_10_percent"] == {"items": 1, "share_of_events": shown[0] / len(events)}
    assert summary["distributions"]["events_of_item"]["max"] == shown[0]
    hours = Counter(event.time % 86_400 // 3600 for event in events)
    assert hours[summary["busiest_hour"]] == max(hours.values())
    files = [path for path in Path(data).rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert summary["bytes"] == sum(path.stat().st_size for path in files)
    assert summary["distributions"]["events_of_shard"]["max"] == max(s.events for s in read_manifest(data).shards)


@pytest.mark.parametrize("name", ["data", "requests"])
def test_lengths_are_those_of_the_sequences_that_are_trained(name: str, request: pytest.FixtureRequest) -> None:
    uri = request.getfixturevalue(name)
    found, manifest, tokens = inspect(uri), read_manifest(uri), tokens_of(uri)
    feedbacks = manifest.feedback_tokens
    expected: dict[int, list[int]] = {history: [] for history in HISTORIES}
    befores = []
    for row in chronologies(uri):
        lengths = [len(tokens[event.item]) for event in row]
        for place, event in enumerate(row):
            if event.label is None:
                continue
            same = [i for i in range(place) if event.request is not None and row[i].request == event.request]
            known = min(same, default=place)
            befores.append(known)
            for history, sums in expected.items():
                behaviours = range(max(0, known - history), known)
                past = sum(lengths[i] + len(feedbacks[row[i].feedback]) for i in behaviours)
                sums.append(len(manifest.prefix_tokens) + past + lengths[place])
    assert summarise(found)["distributions"]["behaviours_before_target"] == distribution(befores)
    for history, sums in expected.items():
        assert found.sequence_tokens[history].summary() == distribution(sums)
    assert sum(len(row) for row in chronologies(uri)) == found.behaviour_tokens.of.sum()
    assert dict(enumerate(found.item_tokens.tolist())) == {item: len(ids) for item, ids in tokens.items()} | {
        item: -1 for item in range(manifest.item_count) if item not in tokens
    }


def test_past_events_of_a_later_part_are_history_and_counted_once(tmp_path: Path) -> None:
    uri = str(tmp_path / "data")
    prepare(spec_of(write_log(tmp_path / "a.csv", ROWS[:HALF])), uri)
    append(spec_of(write_log(tmp_path / "b.csv", ROWS[HALF:]), past_events=1), uri)
    found = inspect(uri)
    for counted in (found.item_events, found.days[0], found.hours, found.split_events, found.behaviour_tokens.of):
        assert counted.sum() == len(ROWS)
    assert found.users == len({row["user"] for row in ROWS})
    # What is past is a behaviour still, and no target.
    expected, past = Counts(), pq.read_table(f"{uri}/{read_manifest(uri).index.path}")["past_events"].to_pylist()
    for row, first in zip(chronologies(uri), past, strict=True):
        expected.add(np.array([i for i, e in enumerate(row) if e.label is not None and i >= first], np.int64))
    assert any(past)
    assert found.behaviours.of.tolist() == expected.of.tolist()
    table = call("data", "inspect", uri).out
    assert [line.split()[:2] for line in table.splitlines() if line.startswith(("0 ", "1 "))] == [
        [str(part), split] for part in (0, 1) for split in SPLITS
    ]


def test_table_is_aligned_and_says_what_the_json_says(data: str) -> None:
    result = call("data", "inspect", data)
    assert result.code == 0, result.err
    summary = good("data", "inspect", data)
    lines = result.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("part"))
    columns = [lines[start].index(word) + len(word) for word in ("events", "impressions", "positives", "rate")]
    for line in lines[start + 1 : start + 8]:
        assert all(line[end - 1] != " " and line[end : end + 1] in (" ", "") for end in columns)
    assert f"{summary['splits']['test']['label_rate']:.4f}" in result.out
    assert f"{summary['distributions']['bytes_of_shard']['max']:,}" in result.out
    assert max(map(len, lines)) < 130 + len(data)


def test_figures_are_png_files_of_a_size(data: str, tmp_path: Path) -> None:
    files = good("data", "inspect", data, "--figures", tmp_path / "figures")["figures"]
    assert sorted(Path(file).name for file in files) == [
        "history_lengths.png", "item_tokens.png", "over_time.png", "popularity.png",
    ]  # fmt: skip
    for file in files:
        content = Path(file).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", content[16:24]) == (960, 576)
    refused(call("data", "inspect", data, "--figures", "s3://bucket/figures"), "figures are written to a local folder")


def test_on_s3_it_says_the_same(data: str, s3_server: SeaweedServer) -> None:
    uri = f"s3://{BUCKET}/inspected"
    storage.upload_dir(data, uri)
    assert good("data", "inspect", uri) | {"uri": ""} == good("data", "inspect", data) | {"uri": ""}


def test_no_data_set_and_a_damaged_shard_are_named(data: str, tmp_path: Path) -> None:
    refused(call("data", "inspect", tmp_path), "holds no manifest.json")
    uri = make_dataset(tmp_path / "x")
    path = Path(uri, read_manifest(uri).shards[1].events_file.path)
    path.write_bytes(path.read_bytes()[:-1])
    refused(call("data", "inspect", uri), path.name, "is truncated")


@given(st.lists(st.integers(0, 300), min_size=1), st.lists(st.integers(0, 50)))
def test_counts_and_values_have_the_same_distribution(first: list[int], second: list[int]) -> None:
    counts = Counts()
    counts.add(np.array(first))
    counts.add(np.array(second, np.int64))
    values = sorted(first + second)
    found = counts.summary()
    assert found == distribution(values)
    assert found["mean"] == pytest.approx(sum(values) / len(values), abs=0.006)
    assert (found["min"], found["max"]) == (values[0], values[-1])
    for share in (0.1, 0.5, 0.9, 0.99):
        quantile = found[f"p{round(100 * share)}"]
        assert sum(v <= quantile for v in values) >= share * len(values) - 1e-9
        assert sum(v < quantile for v in values) < share * len(values) + 1e-9
