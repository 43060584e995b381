"""Events that were logged again: counted in any cut of the log, kept or left out as if they had never been there."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.config.data import SplitSpec
from ctrsink.dataset import splits
from ctrsink.dataset.manifest import read_manifest
from ctrsink.prepare.build import append, prepare
from tests.command_line import call, good
from tests.prepared_in_tasks import HALF, ROWS, Interrupted, contents, spec_of, write_log
from tests.runs import run_tree

events = st.tuples(
    st.sampled_from("uv"), st.integers(0, 2), st.sampled_from("ab"), st.sampled_from([None, 0.0, -0.0, 1.0]),
    st.sampled_from([None, 0, 1]), st.sampled_from([None, "", "r"]),
)  # fmt: skip


@given(st.lists(events, max_size=30))
def test_a_duplicate_has_all_the_values_of_an_event_before_it(log: list[tuple[Any, ...]]) -> None:
    names = ("user", "timestamp", "item", "feedback", "label", "request")
    types = (pa.string(), pa.int64(), pa.string(), pa.float32(), pa.int8(), pa.string())
    columns = [pa.chunked_array([[row[i] for row in log]], kind) for i, kind in enumerate(types)]
    found = splits.duplicates(pa.table(columns, names=list(names)))
    assert found.tolist() == [row in log[:number] for number, row in enumerate(log)]


def again(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """The log with `count` of its events delivered once more, anywhere behind the first time."""
    chance, out = random.Random(seed), list(rows)
    for row in chance.choices(rows, k=count):
        out.insert(chance.randint(out.index(row) + 1, len(out)), dict(row))
    return out


DISTINCT = [row for number, row in enumerate(ROWS) if row not in ROWS[:number]]


@settings(max_examples=6)
@given(st.integers(1, 60), st.integers(0, 99), st.integers(500, 20_000), st.integers(1, len(DISTINCT)))
def test_what_is_dropped_might_as_well_not_have_been_logged(
    tmp_path_factory: pytest.TempPathFactory, count: int, seed: int, block_bytes: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("dropped")
    once = prepare(spec_of(write_log(folder / "once.csv", DISTINCT), duplicates="drop"), str(folder / "once"))
    rows = again(DISTINCT, count, seed)
    for name, piece in (("a", rows[:cut]), ("b", rows[cut:])):
        write_log(folder / "log" / f"{name}.csv", piece)
    twice = prepare(spec_of(folder / "log", duplicates="drop", block_bytes=block_bytes), str(folder / "twice"))
    assert (once.parts[0].duplicates, twice.parts[0].duplicates) == (0, count)
    assert sum(shard.duplicates for shard in twice.shards) == count
    a, b = contents(folder / "once"), contents(folder / "twice")
    for files in (a, b):
        tree = json.loads(files["manifest.json"])
        for place in (*tree["parts"], *tree["shards"]):
            del place["duplicates"]
        files["manifest.json"] = json.dumps(tree).encode()
    assert a == b
    assert twice.skipped_rows == 0


def test_duplicates_are_kept_and_counted_in_any_cut(tmp_path: Path) -> None:
    rows = again(DISTINCT, 40, 0)
    log = write_log(tmp_path / "log.csv", rows)
    whole = prepare(spec_of(log), str(tmp_path / "whole"))
    cut = prepare(spec_of(log, block_bytes=700), str(tmp_path / "cut"))
    assert whole == cut
    assert (whole.events, whole.parts[0].duplicates, whole.parts[0].duplicates_dropped) == (len(rows), 40, False)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")


def test_the_number_is_told_and_how_to_drop_them(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", again(DISTINCT, 40, 1))
    tree = run_tree(str(tmp_path / "data"), str(tmp_path / "run")) | {"prepare": spec_of(log).model_dump(mode="json")}
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(tree))
    kept = call("data", "prepare", "--config", config, "--json")
    assert f"40 of {len(DISTINCT) + 40} events were logged before with the same user, item, time" in kept.err
    assert "prepare.duplicates=drop takes each event once" in kept.err
    assert kept.json["duplicates"] == {"kept": 40}
    assert good("data", "inspect", str(tmp_path / "data"))["duplicates"] == {"kept": 40, "dropped": 0}
    dropped = call("data", "prepare", "--config", config, "prepare.duplicates=drop", "--overwrite", "--json")
    assert f"40 of {len(DISTINCT) + 40} events were logged before" in dropped.err
    assert "left out" in dropped.err
    assert (dropped.json["duplicates"], dropped.json["events"]) == ({"dropped": 40}, len(DISTINCT))
    assert good("data", "inspect", str(tmp_path / "data"))["duplicates"] == {"kept": 0, "dropped": 40}
    assert "0 events kept, 40 events dropped" in call("data", "inspect", str(tmp_path / "data")).out
    assert good("data", "verify", str(tmp_path / "data"))["events"] == len(DISTINCT)


def test_a_part_that_is_appended_drops_its_own_and_leaves_what_is_there(tmp_path: Path) -> None:
    first, second = DISTINCT[:HALF], DISTINCT[HALF:]
    prepare(spec_of(write_log(tmp_path / "a.csv", again(first, 10, 2))), str(tmp_path / "data"))
    split = SplitSpec(train=0.6, valid=0)
    spec = spec_of(write_log(tmp_path / "b.csv", again(second, 20, 3)), duplicates="drop", split=split)
    with pytest.raises(KeyboardInterrupt):
        append(spec, str(tmp_path / "data"), execute=Interrupted(4))
    append(spec, str(tmp_path / "data"))
    old, new = read_manifest(str(tmp_path / "data")).parts
    assert (old.events, old.duplicates, old.duplicates_dropped) == (len(first) + 10, 10, False)
    assert (new.events, new.duplicates, new.duplicates_dropped) == (len(second), 20, True)
    assert good("data", "verify", str(tmp_path / "data"))["events"] == len(DISTINCT) + 10


def test_equal_events_at_other_times_are_no_duplicates() -> None:
    table = pa.table({
        "user": ["u"] * 3, "timestamp": [1, 2, 1], "item": pa.array([0, 0, 0], pa.int32()),
        "feedback": pa.array([np.nan] * 3, pa.float32(), from_pandas=True), "label": pa.array([1, 1, 1], pa.int8()),
        "request": ["r", "r", "s"],
    })  # fmt: skip
    assert splits.duplicates(table).tolist() == [False] * 3
