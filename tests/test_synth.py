"""The synthetic log: same seed same bytes, exact counts, a truth that an independent reader of the log finds again."""

import json
import math
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from ctrsink.config.data import ColumnSpec
from ctrsink.evaluate.metrics import auc
from ctrsink.prepare.synth import binned_auc, synth
from tests.command_line import call, content, good, refused

EVENTS = 30_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 30,000 events in files of 7,000."""
    folder = tmp_path_factory.mktemp("synth") / "log"
    synth(str(folder), EVENTS, seed=3, file_events=7_000)
    return folder


def events_of(folder: Path) -> pa.Table:
    return pa.concat_tables([read(path) for path in sorted((folder / "events").iterdir())])


def read(path: Path) -> pa.Table:
    return csv.read_csv(path) if path.suffix == ".csv" else pq.read_table(path)


def truth_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "truth.json").read_text())


def test_log_is_whole_and_in_order_of_time(made: Path) -> None:
    assert [read(path).num_rows for path in sorted((made / "events").iterdir())] == [7_000, 7_000, 7_000, 7_000, 2_000]
    events, items, truth = events_of(made), csv.read_csv(made / "items.csv"), truth_of(made)
    assert events.column_names == ["user", "item", "timestamp", "click"]
    assert (np.diff(events["timestamp"].to_numpy()) >= 0).all()
    assert set(events["click"].to_pylist()) == {0, 1}
    assert items.column_names == ["item", "title", "genre"]
    assert len(set(items["title"].to_pylist())) == items.num_rows == truth["items"] == 1000
    assert set(events["item"].to_pylist()) <= set(items["item"].to_pylist())
    assert truth["users"] == len(set(events["user"].to_pylist()))
    assert truth["events"] == EVENTS


def test_a_hidden_log_has_the_same_events_and_readers_and_texts_that_say_nothing(made: Path, tmp_path: Path) -> None:
    synth(str(tmp_path / "log"), EVENTS, seed=3, file_events=7_000, hidden=True)
    assert events_of(tmp_path / "log").equals(events_of(made))
    plain, dealt = truth_of(made), truth_of(tmp_path / "log")
    assert dealt["splits"] == plain["splits"]
    assert dealt["rules"] == plain["rules"] | {"hidden": True}
    items, other = (csv.read_csv(folder / "items.csv") for folder in (made, tmp_path / "log"))
    assert sorted(items["genre"].to_pylist()) == sorted(other["genre"].to_pylist())
    same = np.mean([a == b for a, b in zip(items["genre"].to_pylist(), other["genre"].to_pylist(), strict=True)])
    assert 0.15 < same < 0.25  # by chance: a fifth
    # Who believes these texts is far from the reader who knows what they hide.
    assert auc(*read_history(tmp_path / "log", dealt)) < dealt["splits"]["all"]["auc"]["knows_history"] - 0.1


def test_tastes_that_last_are_easier_to_tell(made: Path, tmp_path: Path) -> None:
    synth(str(tmp_path / "log"), EVENTS, seed=3, favourite_days=1000)
    reached = auc(*read_history(tmp_path / "log", truth_of(tmp_path / "log")))
    lasting, changing = (truth_of(folder)["splits"]["all"]["auc"]["knows_history"] for folder in (tmp_path / "log", made))
    assert lasting == pytest.approx(reached, abs=1e-4)
    assert lasting > changing + 0.02


def test_same_seed_same_bytes_and_the_cut_into_files_changes_nothing(made: Path, tmp_path: Path) -> None:
    for form in ("csv", "parquet"):
        for name in ("a", "b"):
            synth(str(tmp_path / form / name), EVENTS, seed=3, form=form)
        assert content(tmp_path / form / "a") == content(tmp_path / form / "b")
    assert events_of(tmp_path / "csv" / "a").equals(events_of(made))
    assert events_of(tmp_path / "parquet" / "a").cast(events_of(made).schema).equals(events_of(made))
    assert truth_of(tmp_path / "csv" / "a") == truth_of(tmp_path / "parquet" / "a") == truth_of(made)
    synth(str(tmp_path / "other"), EVENTS, seed=4)
    assert not events_of(tmp_path / "other").equals(events_of(made))


def test_log_of_several_blocks_is_in_order_with_a_truth_of_the_split_that_prepare_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctrsink.prepare.synth.BLOCK_EVENTS", 4_000)
    synth(str(tmp_path / "log"), EVENTS)
    events, truth = events_of(tmp_path / "log"), truth_of(tmp_path / "log")
    timestamp, click = events["timestamp"].to_numpy(), events["click"].to_numpy()
    assert len(timestamp) == EVENTS
    assert (np.diff(timestamp) >= 0).all()
    ends = [int(timestamp[EVENTS * 8 // 10]), int(timestamp[EVENTS * 9 // 10])]
    assert truth["split_times"] == dict(zip(("train_end", "valid_end"), ends, strict=True))
    split = np.searchsorted(ends, timestamp, side="right")
    for at, name in enumerate(("train", "valid", "test")):
        assert truth["splits"][name]["events"] == (split == at).sum()
        assert truth["splits"][name]["clicks"] == click[split == at].sum()


def test_popularity_activity_and_pauses_are_uneven(made: Path) -> None:
    events = events_of(made)
    popular = np.sort(np.unique(events["item"].to_numpy(), return_counts=True)[1])[::-1]
    ranks = np.arange(1, 51)
    slope = np.polyfit(np.log(ranks), np.log(popular[:50]), 1)[0]
    assert -1.15 < slope < -0.85
    active = np.sort(np.unique(events["user"].to_numpy(), return_counts=True)[1])[::-1]
    assert active[: len(active) // 10].sum() > 0.25 * EVENTS
    order = np.lexsort((events["timestamp"].to_numpy(), events["user"].to_numpy()))
    user, time = events["user"].to_numpy()[order], events["timestamp"].to_numpy()[order]
    pauses = np.diff(time)[np.diff(user) == 0]
    # Bursts and gaps, nearly nothing between them.
    assert (pauses < 600).mean() > 0.8
    assert ((pauses > 600) & (pauses < 3600)).mean() < 0.02
    assert (pauses > 86_400).mean() > 0.04


def read_history(folder: Path, truth: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Clicks and their probabilities for who knows the rules in `truth` and reads each user's past: Bayes, event by event."""
    rules = truth["rules"]
    items = {row["item"]: row for row in csv.read_csv(folder / "items.csv").to_pylist()}
    genres = len(rules["genres"])
    beliefs: dict[int, list[float]] = defaultdict(lambda: [1 / genres] * genres)
    last: dict[int, int] = {}
    found = []
    for event in events_of(folder).to_pylist():
        user, item = event["user"], items[event["item"]]
        kept = math.exp(-(event["timestamp"] - last.get(user, -math.inf)) / (86_400 * rules["favourite_days"]))
        belief = [kept * b + (1 - kept) / genres for b in beliefs[user]]
        quality = rules["quality"][item["title"].split()[0]]
        chances = [
            1 / (1 + math.exp(-(rules["base"] + rules["liking"] * (genre == item["genre"]) + quality)))
            for genre in rules["genres"]
        ]
        found.append(sum(b * p for b, p in zip(belief, chances, strict=True)))
        likely = [b * (p if event["click"] else 1 - p) for b, p in zip(belief, chances, strict=True)]
        beliefs[user] = [b / sum(likely) for b in likely]
        last[user] = event["timestamp"]
    return events_of(folder)["click"].to_numpy(), np.array(found)


def test_the_stated_auc_is_what_a_reader_of_the_history_reaches(made: Path) -> None:
    truth = truth_of(made)
    click, probability = read_history(made, truth)
    assert truth["splits"]["all"]["auc"]["knows_history"] == pytest.approx(auc(click, probability), abs=1e-4)
    # He is calibrated, so nobody who knows as much can do better.
    order = np.argsort(probability)
    for part in np.array_split(order, 8):
        assert click[part].mean() == pytest.approx(probability[part].mean(), abs=0.025)
    for split in truth["splits"].values():
        readers = split["auc"]
        assert readers["knows_favourite"] > readers["knows_history"] + 0.02
        assert readers["knows_history"] > readers["knows_history_without_times"] + 0.01
        assert readers["knows_history_without_times"] > 0.7


def test_binned_auc_is_the_auc_of_the_bins() -> None:
    chance = np.random.default_rng(0)
    score, label = chance.integers(0, 9, 500), chance.integers(0, 2, 500)
    counts = [np.bincount(score[label == value], minlength=9) for value in (0, 1)]
    assert binned_auc(*counts) == pytest.approx(auc(label, score))
    assert math.isnan(binned_auc(counts[0], np.zeros(9)))


def test_a_single_event_is_a_log(tmp_path: Path) -> None:
    result = good("data", "synth", "--to", tmp_path / "log", "--events", 1, "--users", 1, "--items", 2)
    assert (result["events"], result["users"], result["items"]) == (1, 1, 2)
    assert set(result["test_auc"].values()) == {None}
    assert events_of(tmp_path / "log").num_rows == 1


def test_a_folder_in_use_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    refused(call("data", "synth", "--to", tmp_path, "--events", 10), "exists already: choose another folder")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    refused(call("data", "synth", "--to", "s3://bucket/log", "--events", 10), "local folder only")
    refused(call("data", "synth", "--to", tmp_path / "x", "--events", 10, "--seed", -1), "--seed -1")


def test_memory_does_not_grow_with_the_events(tmp_path: Path) -> None:
    program = """
import resource, sys
from ctrsink.prepare import synth
synth.BLOCK_EVENTS = 50_000
synth.synth(sys.argv[1] + "/first", 200_000, users=1000, file_events=100_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
synth.synth(sys.argv[1] + "/second", 1_600_000, users=1000, file_events=100_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20  # MiB; the columns of 1.4 million events more are 40


def test_columns_are_those_of_the_configuration(made: Path) -> None:
    columns = ColumnSpec(feedback="click", label="click")
    wanted = {columns.user, columns.item, columns.timestamp, columns.feedback, columns.label}
    assert wanted == set(events_of(made).column_names)
