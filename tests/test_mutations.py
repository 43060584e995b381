"""300 inputs that are wrong somewhere end well, or in one clear line with nothing half-written; never in a traceback."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctrsink.runtime import start as starting
from tests.command_line import Result, call, content, good
from tests.data_fixtures import event_rows, item_rows, make_events, write_table
from tests.mutator import mutated_bytes, mutated_csv, mutated_lines, mutated_tree, write_mutated_parquet
from tests.runs import run_tree

MAPPING = {"user": "who", "item": "what", "timestamp": "when", "feedback": "stars", "request": "shown"}
EVENTS = make_events(12, 8)


def prepare_tree(folder: Path, ending: str) -> dict[str, Any]:
    """A run on a log of the user's own, as `log.ENDING` and `items.ENDING` in `folder`."""
    return run_tree(str(folder / "data"), str(folder / "run")) | {
        "prepare": {
            "source": {
                "kind": "table",
                "path": str(folder / f"log.{ending}"),
                "items": str(folder / f"items.{ending}"),
                "columns": MAPPING,
            },
            "text": {"item": "{title} ({year})", "prefix": "Likes: "},
            "tokenizer": {"train_vocabulary": 300},
            "split": {"train": 0.7, "valid": 0.15},
            "shard_events": 40,
        },
        "data": {"uri": str(folder / "data"), "examples": "per_target", "history": 3},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared data set, its configuration `run.yaml`, and the exported model of a short run."""
    folder = tmp_path_factory.mktemp("made")
    write_table(folder / "log.csv", event_rows(EVENTS))
    write_table(folder / "items.csv", item_rows())
    (folder / "run.yaml").write_text(yaml.safe_dump(prepare_tree(folder, "csv")))
    good("data", "prepare", "--config", folder / "run.yaml")
    good("train", "--config", folder / "run.yaml", "stages.0.steps=1", "stages.1.steps=1", "evaluate.splits=[valid]")
    good("export", "--run", folder / "run", "--to", folder / "model")
    return folder


def judge(result: Result, folder: Path, before: dict[str, str], *made: str) -> None:
    """Good, with what was to be `made`; or one line and the folder as it was."""
    assert "Traceback" not in result.out + result.err
    assert result.code in (0, 2), result.err
    if result.code == 0:
        assert all((folder / name).exists() for name in made)
        return
    lines = [line for line in result.err.splitlines() if "error:" in line]
    assert lines == result.err.splitlines()[-1:], result.err
    assert lines[0].startswith("error: ")
    assert 20 < len(lines[0]) < 1500, lines[0]
    assert content(folder) == before
    assert not any((folder / name).exists() for name in made)


@pytest.mark.parametrize("number", range(90))
def test_a_configuration(number: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "_train", lambda *args: {})  # a run that can start is good enough
    monkeypatch.chdir(tmp_path)  # where a relative path would lead
    chance = random.Random(f"configuration {number}")
    tree = yaml.safe_load((made / "run.yaml").read_text()) | {"run_dir": "run"}
    if chance.random() < 0.35:
        text = mutated_bytes(chance, yaml.safe_dump(tree).encode())
    else:
        text = yaml.dump(mutated_tree(chance, tree), allow_unicode=bool(number % 2)).encode("utf-8", "surrogatepass")
    (tmp_path / "run.yaml").write_bytes(text)
    before = content(tmp_path)
    judge(call("config", "show", "run.yaml"), tmp_path, before)
    judge(call("train", "--config", "run.yaml"), tmp_path, before)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("number", range(45))
def test_a_log(number: int, ending: str, tmp_path: Path) -> None:
    chance = random.Random(f"{ending} {number}")
    rows = {"log": event_rows(EVENTS), "items": item_rows()}
    for name in rows:
        write_table(tmp_path / f"{name}.{ending}", rows[name])
    which = chance.choice(("log", "log", "items"))
    path = tmp_path / f"{which}.{ending}"
    if ending == "csv":
        path.write_bytes(mutated_csv(chance, path.read_bytes()))
    elif ending == "jsonl":
        path.write_bytes(mutated_lines(chance, rows[which]))
    else:
        write_mutated_parquet(chance, rows[which], path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(prepare_tree(tmp_path, ending)))
    before = content(tmp_path)
    skip = ["--on-bad-row", "skip"] if chance.random() < 0.4 else []
    judge(call("data", "prepare", "--config", tmp_path / "run.yaml", *skip), tmp_path, before, "data")


@pytest.mark.parametrize("number", range(75))
def test_a_file_of_requests(number: int, made: Path, tmp_path: Path) -> None:
    chance = random.Random(f"requests {number}")
    items = [{"title": row["title"], "year": row["year"]} for row in item_rows()]
    history = [{"item": item, "feedback": 4, "timestamp": 10**9 + 60 * n} for n, item in enumerate(items[:4])]
    requests = [{"id": f"r{n}", "history": history[: n + 1], "candidates": items[n:], "timestamp": 1.1e9} for n in range(4)]
    (tmp_path / "in.jsonl").write_bytes(mutated_lines(chance, requests))
    before = content(tmp_path)
    skip = ["--on-bad-request", "skip"] if chance.random() < 0.4 else []
    score = ["score", "--model", made / "model", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    result = call(*score, *skip)
    judge(result, tmp_path, before, "out.jsonl")
    if result.code == 0:
        for line in (tmp_path / "out.jsonl").read_text().splitlines():
            row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
            assert all(0 < p < 1 for p in row["probabilities"]) if "probabilities" in row else row["error"]
