"""Preparation as tasks: equal bytes however the log is cut and whoever reads it, nothing lost by an interruption, and parts."""

import csv
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink import storage
from ctrsink.config.data import ColumnSpec, PrepareSpec, SourceSpec, SplitSpec, TextSpec, TokenizerSpec
from ctrsink.data.dataset import Dataset
from ctrsink.data.manifest import WORK, Manifest, read_file, read_manifest
from ctrsink.data.prepare.build import append, prepare
from ctrsink.data.prepare.execute import Task, in_process
from ctrsink.data.tokenize import load_tokenizer
from ctrsink.data.verify import verify
from ctrsink.errors import InputError, RunError
from tests.builders import make_log, run_tree
from tests.services.ray_cluster import RayCluster

ROWS = sorted(make_log(0, 60), key=lambda row: row["timestamp"])
HALF = len(ROWS) // 2
COLUMNS = ("user", "item", "timestamp", "stars")


def write_log(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def spec_of(path: Path | str, items: Path | None = None, **more: Any) -> PrepareSpec:
    """About ten shards; without an item table, so that items are found while the log is read."""
    source = SourceSpec(kind="table", path=str(path), items=items and str(items), columns=ColumnSpec(feedback="stars"))
    fields: dict[str, Any] = {"shard_events": 50, "split": SplitSpec(train=0.6, valid=0.2)} | more
    return PrepareSpec(source=source, text=TextSpec(item="item {item}"), tokenizer=TokenizerSpec(train_vocabulary=300), **fields)


def contents(folder: Path | str) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log prepared at once; `log.csv` lies beside the data set."""
    folder = tmp_path_factory.mktemp("whole")
    prepare(spec_of(write_log(folder / "log.csv", ROWS)), str(folder / "data"))
    return folder


@settings(max_examples=8)
@given(st.integers(1, 20_000), st.lists(st.integers(1, len(ROWS) - 1), max_size=3, unique=True))
def test_blocks_and_files_change_no_byte(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, block_bytes: int, cuts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    edges = [0, *sorted(cuts), len(ROWS)]
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        write_log(folder / "log" / f"part-{number}.csv", ROWS[a:b])
    prepare(spec_of(folder / "log", block_bytes=block_bytes), str(folder / "data"))
    assert contents(folder / "data") == contents(whole / "data")


VERBS = """
import sys
from ctrsink.cli import main
for verb, config in zip(sys.argv[1::2], sys.argv[2::2]):
    print("exit code", main(["data", verb, "--config", config]))
"""


def test_ray_data_changes_no_byte(whole: Path, tmp_path: Path, ray_cluster: RayCluster) -> None:
    """Four preparations by one process that has joined a cluster: local, on S3, appended there, and of a log with a bad row."""
    uri = "s3://ctrsink-test/prepared-by-ray"
    half = write_log(tmp_path / "half.csv", ROWS[:HALF])
    rest = write_log(tmp_path / "rest.csv", ROWS[HALF:])
    broken = write_log(tmp_path / "broken.csv", [*ROWS[:300], ROWS[300] | {"stars": "good"}, *ROWS[301:]])
    arguments: list[str] = []
    for verb, log, to in (
        ("prepare", whole / "log.csv", tmp_path / "data"),
        ("prepare", half, uri),
        ("append", rest, uri),
        ("prepare", broken, tmp_path / "none"),
    ):
        section = spec_of(log, block_bytes=4_000, workers=2).model_dump(mode="json")
        tree = run_tree(prepare=section, runtime={"kind": "ray", "address": ray_cluster.gcs_address}, data={"uri": str(to)})
        config = tmp_path / f"{log.stem}.yaml"
        config.write_text(yaml.safe_dump(tree))
        arguments += [verb, str(config)]
    # As for the cluster: without it Ray looks for 127.0.0.1 at the machine's outer address.
    environment = os.environ | ray_cluster.env() | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    command = [sys.executable, "-c", VERBS, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == [f"exit code {code}" for code in (0, 0, 0, 2)], done.stderr
    assert "broken.csv, row 301 (line 302), column stars: 'good' is not a number" in done.stderr
    assert not (tmp_path / "none" / "manifest.json").exists()
    assert contents(tmp_path / "data") == contents(whole / "data")
    storage.download_dir(uri, tmp_path / "fetched")
    prepare(spec_of(half), str(tmp_path / "here"))
    append(spec_of(rest), str(tmp_path / "here"))
    assert contents(tmp_path / "fetched") == contents(tmp_path / "here")


class Interrupted:
    """Runs tasks here until `limit` of them are done, then as if the machine went down."""

    def __init__(self, limit: int) -> None:
        self.limit, self.done = limit, 0

    def __call__(self, task: Task, numbers: Sequence[int]) -> Iterator[int]:
        for number in in_process(task, numbers):
            if self.done == self.limit:
                raise KeyboardInterrupt
            self.done += 1
            yield number


class Counting:
    """Runs tasks here and counts them."""

    def __init__(self) -> None:
        self.done = 0

    def __call__(self, task: Task, numbers: Sequence[int]) -> Iterator[int]:
        self.done += len(numbers)
        return in_process(task, numbers)


@pytest.mark.parametrize("limit", [0, 1, 6, 12, 16])
def test_an_interrupted_preparation_is_no_data_set_and_goes_on(whole: Path, tmp_path: Path, limit: int) -> None:
    spec, to = spec_of(whole / "log.csv", block_bytes=2_000), tmp_path / "data"
    every = Counting()
    prepare(spec, str(tmp_path / "once"), execute=every)
    with pytest.raises(KeyboardInterrupt):
        prepare(spec, str(to), execute=Interrupted(limit))
    with pytest.raises(InputError, match="holds no manifest"):
        read_manifest(str(to))
    rest = Counting()
    prepare(spec, str(to), execute=rest)
    assert contents(to) == contents(whole / "data")
    # The task that was under way may have ended before the machine went down.
    assert every.done - limit - 1 <= rest.done <= every.done - limit


def test_what_was_interrupted_is_not_taken_up_for_another_log(whole: Path, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", ROWS[:HALF])
    with pytest.raises(KeyboardInterrupt):
        prepare(spec_of(log, block_bytes=2_000), str(tmp_path / "data"), execute=Interrupted(8))
    write_log(log, ROWS)
    prepare(spec_of(log, block_bytes=2_000), str(tmp_path / "data"))
    assert contents(tmp_path / "data") == contents(whole / "data")


@pytest.mark.parametrize(("first", "second"), [(20, 300), (300, 20)])
@pytest.mark.parametrize("limit", [3, 8])
def test_what_was_interrupted_goes_on_with_shards_of_another_size(
    whole: Path, tmp_path: Path, first: int, second: int, limit: int
) -> None:
    """Blocks are sliced as finely as the shards ask for."""
    log, to = whole / "log.csv", tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        prepare(spec_of(log, block_bytes=2_000, shard_events=first), str(to), execute=Interrupted(limit))
    prepare(spec_of(log, block_bytes=2_000, shard_events=second), str(to))
    prepare(spec_of(log, block_bytes=2_000, shard_events=second), str(tmp_path / "fresh"))
    assert contents(to) == contents(tmp_path / "fresh")


def test_interrupted_attempts_with_two_configurations_do_not_mix(whole: Path, tmp_path: Path) -> None:
    def attempt(valid: float, limit: int) -> None:
        spec = spec_of(whole / "log.csv", block_bytes=2_000, split=SplitSpec(train=0.6, valid=valid))
        prepare(spec, str(tmp_path / "data"), execute=Interrupted(limit))

    for valid, limit in ((0.2, 14), (0.1, 4)):  # each stops in the middle of the shards
        with pytest.raises(KeyboardInterrupt):
            attempt(valid, limit)
    attempt(0.2, 1000)
    assert contents(tmp_path / "data") == contents(whole / "data")


def test_a_failed_repetition_keeps_what_was_done(whole: Path, tmp_path: Path) -> None:
    spec, to = spec_of(whole / "log.csv", block_bytes=2_000), str(tmp_path / "data")
    with pytest.raises(KeyboardInterrupt):
        prepare(spec, to, execute=Interrupted(5))
    with pytest.raises(InputError, match="does not exist"):
        prepare(spec_of(tmp_path / "typo.csv"), to)
    rest = Counting()
    prepare(spec, to, execute=rest)
    every = Counting()
    prepare(spec, str(tmp_path / "once"), execute=every)
    assert rest.done <= every.done - 5


@pytest.mark.parametrize("name", ["shards", "tokenizer"])
def test_folders_that_are_not_ours_stay(whole: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "model" / name).mkdir(parents=True)
    (tmp_path / "model" / name / "tokenizer.json").write_text("mine")
    with pytest.raises(InputError, match=f"holds a folder {name} that is not a data set's"):
        prepare(spec_of(whole / "log.csv"), str(tmp_path / "model"))
    assert contents(tmp_path / "model") == {f"{name}/tokenizer.json": b"mine"}


def test_an_old_data_set_stays_until_the_new_log_is_known_to_be_good(whole: Path, tmp_path: Path) -> None:
    to = tmp_path / "data"
    prepare(spec_of(whole / "log.csv"), str(to))
    log = write_log(tmp_path / "log.csv", [*ROWS[:200], ROWS[0] | {"item": ""}])
    with pytest.raises(InputError, match="row 201"):
        prepare(spec_of(log), str(to), overwrite=True)
    assert contents(to) == contents(whole / "data")
    with pytest.raises(KeyboardInterrupt):
        prepare(spec_of(whole / "log.csv", block_bytes=2_000), str(to), overwrite=True, execute=Interrupted(3))
    assert read_manifest(str(to)) == read_manifest(str(whole / "data"))


def test_a_bad_row_is_counted_over_the_blocks_of_its_file(tmp_path: Path) -> None:
    rows = [*ROWS[:400], ROWS[400] | {"timestamp": "noon"}, *ROWS[401:]]
    write_log(tmp_path / "log" / "a.csv", ROWS[:100])
    write_log(tmp_path / "log" / "b.csv", rows)
    spec = spec_of(tmp_path / "log", block_bytes=1_000)
    with pytest.raises(InputError, match=r"b\.csv, row 401 \(line 402\), column timestamp: 'noon' is not a number"):
        prepare(spec, str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()
    manifest = prepare(spec, str(tmp_path / "data"), on_bad_row="skip")
    assert (manifest.events, manifest.skipped_rows) == (100 + len(ROWS) - 1, 1)


# Parts.


@pytest.fixture(scope="module")
def appended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The first half prepared and the second appended, and the manifest before that."""
    folder = tmp_path_factory.mktemp("appended")
    before = prepare(spec_of(write_log(folder / "a.csv", ROWS[:HALF])), str(folder / "data"))
    append(spec_of(write_log(folder / "b.csv", ROWS[HALF:]), past_events=3), str(folder / "data"))
    return folder / "data", before


def chronologies(folder: Path, part: int) -> dict[str, tuple[list[tuple[int, str]], int]]:
    """User -> (time and item of each event, number of past events), from the shards of a part."""
    dataset, found = Dataset(str(folder)), {}
    names = dataset.read_items()["id"].to_pylist()
    for user in range(dataset.manifest.users):
        shard, row = dataset.locate(user)
        if dataset.manifest.shards[int(dataset.index["shard"][user])].part == part:
            a, b = shard.offsets[row], shard.offsets[row + 1]
            events = [(int(t), names[i]) for t, i in zip(shard.timestamps[a:b], shard.items[a:b], strict=True)]
            assert events == sorted(events, key=lambda e: e[0])
            assert str(shard.users[row]) not in found
            found[str(shard.users[row])] = (events, int(dataset.index["past_events"][user]))
    return found


def test_appended_chronologies_begin_with_the_latest_past_events(appended: tuple[Path, Manifest]) -> None:
    old, new = (chronologies(appended[0], part) for part in (0, 1))
    assert set(new) == {row["user"] for row in ROWS[HALF:]}
    for user, (events, past) in new.items():
        assert past == min(3, len(old[user][0]) if user in old else 0)
        assert events[:past] == (old[user][0][-past:] if past else [])
        assert events[past:] == [(row["timestamp"], row["item"]) for row in ROWS[HALF:] if row["user"] == user]
    assert any(past == 3 for _, past in new.values())
    assert any(past < 3 for _, past in new.values())


def test_past_events_come_through_several_parts(tmp_path: Path) -> None:
    cuts = [0, 200, 210, 400, len(ROWS)]
    for number, (a, b) in enumerate(itertools.pairwise(cuts)):
        spec = spec_of(write_log(tmp_path / f"{number}.csv", ROWS[a:b]), past_events=4, split=SplitSpec(train=0.5, valid=0))
        (append if number else prepare)(spec, str(tmp_path / "data"))
    seen: dict[str, list[tuple[int, str]]] = {}
    for part in range(4):
        for user, (events, past) in chronologies(tmp_path / "data", part).items():
            assert events[:past] == seen.get(user, [])[-4:]
            seen[user] = [*seen.get(user, []), *events[past:]]
    assert sum(len(events) for events in seen.values()) == len(ROWS)


def test_appending_changes_nothing_that_is_there(appended: tuple[Path, Manifest]) -> None:
    folder, before = appended
    after = read_manifest(str(folder))
    assert after.identities[:1] == (before.identity,)
    assert after.identity != before.identity
    assert after.shards[: len(before.shards)] == before.shards
    assert after.feedback_texts[: len(before.feedback_texts)] == before.feedback_texts
    assert after.tokenizer_fingerprint == before.tokenizer_fingerprint
    assert not (folder / WORK).exists()
    names = {path.name for path in folder.rglob("*.parquet")}
    assert {"index.parquet", "items.parquet", "00000.parquet"} < names
    for entry in [
        before.index,
        before.items,
        *before.tokenizer,
        *(f for s in before.shards for f in (s.events_file, s.tokens_file)),
    ]:
        assert read_file(str(folder), entry)
    assert (after.events, before.events) == (len(ROWS), HALF)
    assert after.splits["train"].impressions == sum(part.splits["train"].impressions for part in after.parts)


def test_items_and_feedback_that_are_new_come_behind_the_known_ones(tmp_path: Path) -> None:
    def items(names: str) -> Path:
        path = tmp_path / f"items-{names}.csv"
        path.write_text("item,title\n" + "".join(f"{name},the {name}\n" for name in names))
        return path

    def spec(name: str, known: str, times: range, items_at: str, stars: int) -> PrepareSpec:
        rows = [{"user": "u", "item": i, "timestamp": t, "stars": t % 2 * stars} for t, i in zip(times, items_at, strict=True)]
        log = write_log(tmp_path / name, rows)
        text = TextSpec(item="{title}")
        return spec_of(log, items(known), split=SplitSpec(train=0.6, valid=0), positive_from=1).model_copy(update={"text": text})

    to = str(tmp_path / "data")
    before = prepare(spec("a.csv", "bdf", range(0, 10), "bdfbdfbdfb", 5), to)
    after = append(spec("b.csv", "abc", range(20, 30), "abcabcabca", 4), to)
    table = Dataset(to).read_items()
    assert table["id"].to_pylist() == ["b", "d", "f", "a", "c"]
    assert table["text"].to_pylist() == [f"the {name}" for name in "bdfac"]
    assert after.feedback_texts == (*before.feedback_texts, " 4\n")
    assert after.feedback_tokens[: len(before.feedback_tokens)] == before.feedback_tokens
    dataset = Dataset(to)
    shard, row = dataset.locate(dataset.manifest.users - 1)
    tokens = [shard.tokens.values[a:b].tolist() for a, b in zip(shard.tokens.offsets, shard.tokens.offsets[1:], strict=False)]
    chronology = shard.chronology(row)
    assert [load_tokenizer(to).decode(tokens[i]) for i in chronology.texts[-3:]] == ["the b", "the c", "the a"]
    assert [after.feedback_texts[i] for i in chronology.feedbacks[-2:]] == [" 0\n", " 4\n"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": slice(HALF - 1, None)}, r"begins at \d+, but the data set .* reaches to \d+ .* append events that are newer"),
        ({"positive_from": 2.0}, r"prepare.positive_from is not that of the data set .* \(4.0\)"),
        ({"text": TextSpec(item="{item}")}, "prepare.text is not that of the data set"),
    ],
)
def test_what_cannot_be_appended_is_refused_and_changes_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    to = tmp_path / "data"
    prepare(spec_of(write_log(tmp_path / "a.csv", ROWS[:HALF])), str(to))
    before = contents(to)
    spec = spec_of(write_log(tmp_path / "b.csv", ROWS[change.pop("rows", slice(HALF, None))])).model_copy(update=change)
    with pytest.raises(InputError, match=message):
        append(spec, str(to))
    assert contents(to) == before


def test_an_interrupted_append_leaves_the_data_set_as_it_was_and_goes_on(appended: tuple[Path, Manifest], tmp_path: Path) -> None:
    to = tmp_path / "data"
    first = prepare(spec_of(write_log(tmp_path / "a.csv", ROWS[:HALF])), str(to))
    spec = spec_of(write_log(tmp_path / "b.csv", ROWS[HALF:]), past_events=3)
    with pytest.raises(KeyboardInterrupt):
        append(spec, str(to), execute=Interrupted(3))
    assert read_manifest(str(to)) == first
    append(spec, str(to))
    assert contents(to) == contents(appended[0])


class Meanwhile:
    """Runs tasks here; before the last kind of them begins, something else happens."""

    def __init__(self, happen: Callable[[], object]) -> None:
        self.happen, self.calls = happen, 0

    def __call__(self, task: Task, numbers: Sequence[int]) -> Iterator[int]:
        self.calls += 1
        if self.calls == 2:
            self.happen()
        return in_process(task, numbers)


def test_of_two_appends_at_once_one_is_told_to_try_again(tmp_path: Path) -> None:
    to = str(tmp_path / "data")
    prepare(spec_of(write_log(tmp_path / "a.csv", ROWS[:HALF])), to)
    early, late = (write_log(tmp_path / f"{n}.csv", rows) for n, rows in (("b", ROWS[HALF:500]), ("c", ROWS[500:])))
    after: list[Manifest] = []
    with pytest.raises(RunError, match=r"[Rr]un this again"):
        append(spec_of(late), to, execute=Meanwhile(lambda: after.append(append(spec_of(early), to))))
    assert read_manifest(to) == after[0]
    assert verify(to, print)["files"] > 0
    manifest = append(spec_of(late), to)
    assert (manifest.events, len(manifest.parts)) == (len(ROWS), 3)
    assert verify(to, print)["files"] > 0


def test_an_append_without_item_table_needs_one_for_new_items_only(tmp_path: Path) -> None:
    items = tmp_path / "items.csv"
    items.write_text("item,title\n" + "".join(f"{name},the {name}\n" for name in "ab"))
    text = {"text": TextSpec(item="{title}")}

    def spec(name: str, start: int, names: str, table: Path | None) -> PrepareSpec:
        rows = [{"user": "u", "item": i, "timestamp": start + n, "stars": 5 * (n % 2)} for n, i in enumerate(names)]
        log = write_log(tmp_path / name, rows)
        return spec_of(log, table, split=SplitSpec(train=0.6, valid=0), positive_from=1).model_copy(update=text)

    to = str(tmp_path / "data")
    prepare(spec("a.csv", 0, "ababab", items), to)
    assert append(spec("b.csv", 10, "bababa", None), to).item_count == 2
    with pytest.raises(InputError, match=r"the item 'x' is new and has no field 'title'.*prepare.source.items"):
        append(spec("c.csv", 20, "baxaba", None), to)
