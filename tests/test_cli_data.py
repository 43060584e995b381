"""`ctrsink data prepare` on a log of the user's own, good and bad, and what S3 may answer on any verb."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.local.seaweed import SeaweedServer
from ctrsink import storage
from tests.command_line import call, content, good, refused
from tests.conftest import BUCKET
from tests.data_fixtures import event_rows, item_rows, make_events, write_table
from tests.runs import run_tree

MAPPING = {"user": "who", "item": "what", "timestamp": "when", "feedback": "stars"}


def own_log(folder: Path, ending: str = "csv") -> Path:
    """A user's log of 240 events, its items, and the configuration of a short run on them; returns the configuration."""
    log = write_table(folder / f"log.{ending}", event_rows(make_events(20, 12)))
    items = write_table(folder / f"items.{ending}", item_rows())
    tree = run_tree(str(folder / "data"), str(folder / "run"))
    tree["prepare"] = {
        "source": {"kind": "table", "path": str(log), "items": str(items), "columns": MAPPING},
        "text": {"item": "{title} ({year})"},
        "tokenizer": {"train_vocabulary": 300},
        "split": {"train": 0.7, "valid": 0.15},
        "shard_events": 80,
    }
    config = folder / "own.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


def test_every_format_goes_from_the_log_to_scores_and_gives_the_same(tmp_path: Path) -> None:
    evaluations, scores = [], []
    for ending in ("csv", "jsonl", "parquet"):
        folder = tmp_path / ending
        config = own_log(folder, ending)
        made = good("data", "prepare", "--config", config)
        assert (made["users"], made["items"], made["events"], made["skipped_rows"]) == (20, 6, 240, 0)
        assert made["shards"] > 1
        trained = good("train", "--config", config, "stages.0.steps=2", "stages.1.steps=3", "train.log_every=2")
        assert (trained["steps"], trained["finished"], trained["run_dir"]) == (5, True, str(folder / "run"))
        evaluation = good("evaluate", "--run", folder / "run")["evaluation"]
        assert set(evaluation) == {"valid", "test"}
        assert evaluation["test"]["impressions"] == trained["evaluation"]["test"]["impressions"] > 0
        evaluations.append(evaluation)
        assert good("export", "--run", folder / "run", "--to", folder / "model")["step"] == 5
        item = {"title": "Paper Moonship", "year": 1994}
        history = [{"item": item, "feedback": 5, "timestamp": 1_000_000_000}]
        request = {"id": "a", "history": history, "candidates": [item, {"title": "Oak", "year": "1961"}], "timestamp": 1.1e9}
        (folder / "requests.jsonl").write_text(json.dumps(request) + "\n")
        result = call("score", "--model", folder / "model", "--input", folder / "requests.jsonl", "--json")
        assert result.json == {"requests": 1, "candidates": 2}
        scored = json.loads(result.out.splitlines()[0])
        assert scored["id"] == "a"
        assert all(0 < p < 1 for p in scored["probabilities"])
        scores.append(scored["probabilities"])
    assert evaluations[0] == evaluations[1] == evaluations[2]
    assert scores[0] == scores[1] == scores[2]


def test_per_target_with_signals_of_the_target(tmp_path: Path) -> None:
    config = own_log(tmp_path)
    good("data", "prepare", "--config", config)
    changes = ["data.examples=per_target", "model.sinks.signals=[recency_rank, time_gap]", "evaluate.max_sequences=1"]
    trained = good("train", "--config", config, *changes, "stages.0.steps=2", "stages.1.steps=2")
    assert trained["impressions"] == 4 * 8
    # One impression has one class: there is no AUC, and JSON has no NaN for it.
    assert trained["evaluation"]["test"]["impressions"] == 1
    assert trained["evaluation"]["test"]["auc"] is None
    refused(call("train", "--config", config, *changes[1:], f"run_dir={tmp_path / 'x'}"), "recency_rank depends on the target")
    assert not (tmp_path / "x").exists()


def spoil_cell(column: str, value: object, number: int) -> Callable[[Path], None]:
    """Replace the cell in a column of data row `number`, counted from 1."""

    def spoil(log: Path) -> None:
        rows = event_rows(make_events(20, 12))
        rows[number - 1][column] = value
        write_table(log, rows)

    return spoil


BAD_LOGS: list[tuple[Callable[[Path], Any], tuple[str, ...]]] = [
    (Path.unlink, ("log.csv does not exist: correct the path",)),
    (lambda log: log.write_text(""), ("log.csv is empty",)),
    (lambda log: log.write_text("who,what,when,stars,shown\n"), ("log.csv holds no event",)),
    (lambda log: log.write_text("who,what,stars,shown\nu,i1,5,r\n"), ("log.csv has no column 'when'",)),
    (spoil_cell("when", None, 7), ("log.csv, row 7 (line 8), column when: the timestamp is missing", "--on-bad-row skip")),
    (spoil_cell("when", "noon", 2), ("log.csv, row 2 (line 3), column when: 'noon' is not a number", "--on-bad-row skip")),
    (spoil_cell("stars", "good", 3), ("log.csv, row 3 (line 4), column stars: 'good' is not a number", "--on-bad-row skip")),
    (spoil_cell("what", "i99", 4), ("log.csv, row 4 (line 5), column what: 'i99' is not in the item table",)),
]


@pytest.mark.parametrize(("spoil", "parts"), BAD_LOGS, ids=[parts[0] for _, parts in BAD_LOGS])
def test_bad_log_is_named_and_no_data_set_changes(tmp_path: Path, spoil: Callable[[Path], Any], parts: tuple[str, ...]) -> None:
    config = own_log(tmp_path)
    good("data", "prepare", "--config", config)
    before = content(tmp_path / "data")
    spoil(tmp_path / "log.csv")
    refused(call("data", "prepare", "--config", config, "--to", tmp_path / "other"), *parts)
    assert not (tmp_path / "other").exists()
    refused(call("data", "prepare", "--config", config, "--overwrite"), *parts)
    assert content(tmp_path / "data") == before


def test_bad_rows_are_skipped_when_asked_and_counted(tmp_path: Path) -> None:
    config = own_log(tmp_path)
    rows = event_rows(make_events(20, 12))
    rows[1]["when"], rows[5]["stars"], rows[9]["when"] = None, "good", "noon"
    write_table(tmp_path / "log.csv", rows)
    made = good("data", "prepare", "--config", config, "--on-bad-row", "skip")
    assert (made["events"], made["skipped_rows"]) == (237, 3)
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["parts"][0]["skipped_rows"] == 3
    result = call("data", "prepare", "--config", config, "--on-bad-row", "skip", "--overwrite")
    assert "skipped 3 bad rows; the first: " in result.err
    assert "skipped_rows: 3" in result.out.splitlines()


def test_a_data_set_is_not_overwritten_unasked(tmp_path: Path) -> None:
    config = own_log(tmp_path)
    good("data", "prepare", "--config", config)
    before = content(tmp_path / "data")
    refused(call("data", "prepare", "--config", config, "prepare.shard_events=40"), "holds a data set already", "--overwrite")
    assert content(tmp_path / "data") == before
    assert good("data", "prepare", "--config", config, "prepare.shard_events=40", "--overwrite")["shards"] > 3
    tree = yaml.safe_load(config.read_text())
    del tree["prepare"]
    config.write_text(yaml.safe_dump(tree))
    refused(call("data", "prepare", "--config", config), "own.yaml has no section prepare")


@pytest.fixture
def attempts(tmp_path: Path) -> Callable[[str], list[tuple[object, ...]]]:
    """Commands that each reach for a place on S3 with good local input otherwise."""
    config = own_log(tmp_path)
    good("data", "prepare", "--config", config)
    good("train", "--config", config, "stages.0.steps=1", "stages.1.steps=1")
    (tmp_path / "in.jsonl").write_text("{}\n")

    def commands(place: str) -> list[tuple[object, ...]]:
        return [
            ("data", "prepare", "--config", config, "--to", place),
            ("train", "--config", config, f"run_dir={place}"),
            ("train", "--config", config, f"run_dir={tmp_path / 'new'}", f"data.uri={place}"),
            ("evaluate", "--run", place),
            ("export", "--run", tmp_path / "run", "--to", place),
            ("score", "--model", place, "--input", tmp_path / "in.jsonl"),
        ]

    return commands


def test_a_bucket_that_does_not_exist(
    tmp_path: Path, attempts: Callable[[str], list[tuple[object, ...]]], s3_server: SeaweedServer
) -> None:
    place = "s3://no-such-bucket/a/b"
    before = content(tmp_path)
    for command in attempts(place):
        refused(call(*command), place, "the bucket no-such-bucket does not exist: create it, or correct the name")
    assert not (tmp_path / "new").exists()
    assert content(tmp_path) == before


@pytest.mark.parametrize("wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_told_and_never_shown(
    tmp_path: Path,
    attempts: Callable[[str], list[tuple[object, ...]]],
    s3_server: SeaweedServer,
    monkeypatch: pytest.MonkeyPatch,
    wrong: str,
) -> None:
    place = f"s3://{BUCKET}/wrong/{wrong.lower()}"
    with monkeypatch.context() as environment:
        environment.setenv(wrong, "0123456789abcdef")
        before = content(tmp_path)
        for command in attempts(place):
            result = call(*command, "--json")
            refused(result, place, "S3 refused access: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
            for secret in (s3_server.access_key, s3_server.secret_key, "0123456789abcdef"):
                assert secret not in result.out + result.err
        assert not (tmp_path / "new").exists()
        assert content(tmp_path) == before
    assert not storage.exists(place)


def test_on_s3_the_same_verbs_work(tmp_path: Path, s3_server: SeaweedServer) -> None:
    config, place = own_log(tmp_path), f"s3://{BUCKET}/own"
    good("data", "prepare", "--config", config, "--to", f"{place}/data")
    places = [f"data.uri={place}/data", f"run_dir={place}/run"]
    assert good("train", "--config", config, *places, "stages.0.steps=1", "stages.1.steps=1")["steps"] == 2
    # Nothing of it lies on local disk, which the configuration names.
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "run").exists()
    assert good("evaluate", "--run", f"{place}/run", "--split", "test")["evaluation"]["test"]["impressions"] > 0
    good("export", "--run", f"{place}/run", "--to", f"{place}/model")
    request = {"history": [], "candidates": [{"title": "Oak", "year": ""}], "timestamp": 5}
    (tmp_path / "in.jsonl").write_text(json.dumps(request))
    scored = good("score", "--model", f"{place}/model", "--input", tmp_path / "in.jsonl", "--output", f"{place}/scores.jsonl")
    assert scored == {"requests": 1, "candidates": 1}
    assert len(json.loads(storage.read_bytes(f"{place}/scores.jsonl"))["probabilities"]) == 1
    refused(call("export", "--run", f"{place}/run", "--to", f"{place}/model"), f"{place}/model is not empty")
