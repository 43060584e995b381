"""What was served becomes a data set: sampled by user, never waited for, joined with its clicks, each event once."""

import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrsink import storage
from ctrsink.config.serve import RequestLogSpec, ServeSpec
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import StorageUnavailable
from ctrsink.prepare.served import EVENT_SCHEMA
from ctrsink.serve import request_log
from ctrsink.serve.metrics import Metrics
from ctrsink.serve.model import Model
from ctrsink.serve.request_log import RequestLog
from tests.command_line import call, good, refused
from tests.serve_fixtures import Exported


@pytest.fixture(scope="module")
def model(served: Exported) -> Model:
    return Model.load(served.models[0], ServeSpec(model=served.models[0]))


def logged(metrics: Metrics, outcome: str) -> float:
    return metrics.registry.get_sample_value("ctrsink_serve_logged_total", {"outcome": outcome}) or 0.0


def serve(model: Model, trees: list[dict[str, Any]], to: Path, **spec: Any) -> tuple[Metrics, list[list[float]]]:
    """Score and log them all, as the service does; the scores."""
    metrics = Metrics()
    log = RequestLog(RequestLogSpec(to=str(to), **{"share": 1.0, **spec}), metrics)
    answers: list[list[float]] = []
    for tree in trees:
        request = model.parse(tree)
        (scores,) = model.run([model.encode(request)])
        assert isinstance(scores, list)
        log.take(tree["id"], request, scores, model)
        answers.append(scores)
    log.close()
    return metrics, answers


def item(name: int) -> dict[str, Any]:
    return {"id": f"i{name}", "title": f"Film {name}", "year": str(1990 + name)}


def visits(user: str, count: int) -> list[dict[str, Any]]:
    """Requests of a user who clicks on the first of three candidates each time; a history holds all clicks before."""
    trees: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = [{"item": item(90), "feedback": 3.0, "timestamp": 500}]
    for number in range(count):
        name, when = f"{user}-{number}", 1000 + 100 * number + len(user)
        shown = [item(number % 5), item(10 + number % 3), item(20)]
        trees.append({"id": name, "user": user, "timestamp": when, "history": list(history), "candidates": shown})
        history.append({"item": shown[0], "feedback": 1.0, "timestamp": when + 5, "request": name})
    return trees


def test_what_was_served_is_a_data_set(model: Model, tmp_path: Path, repository: Path) -> None:
    trees = [tree for user in ("ann", "bo", "cem", "doris") for tree in visits(user, 8)]
    metrics, scores = serve(model, trees, tmp_path / "log", rows=100)
    assert logged(metrics, "written") == len(trees)
    files = sorted((tmp_path / "log/events").iterdir())
    assert len(files) > 1
    assert [file.name for file in files] == sorted(file.name for file in (tmp_path / "log/items").iterdir())
    clicks = [{"request": tree["id"], "item": tree["candidates"][0]["id"]} for tree in trees]
    (tmp_path / "clicks.jsonl").write_text(
        "".join(json.dumps(c) + "\n" for c in [*clicks, clicks[0], {"request": "x", "item": "i1"}])
    )
    made = tmp_path / "made"
    counts = good("data", "served", "--log", tmp_path / "log", "--clicks", tmp_path / "clicks.jsonl", "--to", made)
    # The behaviour of 500 is one of each user; all others are impressions that were clicked.
    expected = {"requests": 32, "impressions": 96, "clicks": 32, "clicks_elsewhere": 1, "behaviours": 4}
    assert counts == expected | {"items": 10}
    events = pq.read_table(made / "events.parquet").to_pylist()
    shown = {(row["request"], row["position"]): row for row in events if row["position"] is not None}
    for tree, found in zip(trees, scores, strict=True):
        for position, score in enumerate(found):
            row = shown[tree["id"], position]
            assert (row["score"], row["label"], row["model"]) == (score, int(position == 0), model.version)
            assert row["item"] == tree["candidates"][position]["id"]
            # The user's next request tells how they reacted.
            assert row["feedback"] == (1.0 if position == 0 and not tree["id"].endswith("-7") else None)
    data = tmp_path / "data"
    source = [f"prepare.source.path={made}/events.parquet", f"prepare.source.items={made}/items.parquet"]
    text = 'prepare.text.item="{title} ({year})"'
    tokens = "prepare.tokenizer.train_vocabulary=300"
    found = good("data", "prepare", "--config", repository / "configs/served.yaml", "--to", data, *source, text, tokens)
    assert (found["users"], found["events"]) == (4, 100)
    assert Dataset(str(data)).manifest.labelled
    titles = Dataset(str(data)).read_items().column("title").to_pylist()
    assert sorted(titles) == sorted({f"Film {number}" for number in (*range(5), *range(10, 13), 20, 90)})


def test_a_user_is_logged_always_or_never(model: Model, tmp_path: Path) -> None:
    trees = [tree for number in range(60) for tree in visits(f"user {number}", 3)]
    metrics, _ = serve(model, trees, tmp_path, share=0.3)
    users = pq.read_table(tmp_path / "events").column("user").to_pylist()
    assert 5 <= len(set(users)) <= 35
    assert logged(metrics, "written") == 3 * len(set(users))


def test_requests_without_user_or_ids_are_logged_too(model: Model, tmp_path: Path) -> None:
    candidates = [{"title": "A", "year": "1"}, {"title": "B", "year": None}, {"title": "A", "year": 1}]
    trees = [{"id": name, "timestamp": 5, "candidates": candidates} for name in (7, "x")]
    serve(model, trees, tmp_path)
    table = pq.read_table(tmp_path / "events")
    assert table.schema.equals(EVENT_SCHEMA)
    rows = table.to_pylist()
    assert [row["request"] for row in rows] == ["7"] * 3 + ["x"] * 3
    assert len({row["user"] for row in rows}) == 2
    first, second, third = (row["item"] for row in rows[:3])
    assert first == third != second
    assert len(pq.read_table(tmp_path / "items")) == 2


def test_who_answers_never_waits_for_the_log(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def stuck(uri: str, content: bytes) -> None:
        go.wait(30)
        raise StorageUnavailable("s3:// is away")

    monkeypatch.setattr(storage, "write_bytes", stuck)
    monkeypatch.setattr(request_log, "_MOST_ROWS", 30)
    tree = visits("ann", 1)[0]
    request = model.parse(tree)
    metrics = Metrics()
    log = RequestLog(RequestLogSpec(to=str(tmp_path), share=1.0, rows=4), metrics)
    for _ in range(50):  # 4 rows each: the first is being written, seven have room
        log.take("a", request, [0.1, 0.2, 0.3], model)
    assert 40 <= logged(metrics, "dropped") <= 43
    go.set()
    log.close()
    assert logged(metrics, "dropped") == 50
    assert logged(metrics, "written") == 0


def test_a_log_that_is_none_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "clicks.csv").write_text("request,thing\na,b\n")
    arguments = ["--clicks", tmp_path / "clicks.csv", "--to", tmp_path / "made"]
    refused(call("data", "served", "--log", tmp_path / "none", *arguments), "none/events holds no log of requests")
    serve(model, visits("ann", 1), tmp_path / "log")
    refused(call("data", "served", "--log", tmp_path / "log", *arguments), "clicks.csv has no column 'item'")
    pq.write_table(pa.table({"user": ["a"]}), tmp_path / "log/events/a.parquet")
    (tmp_path / "log/events/b.parquet").write_bytes(b"PAR1")
    refused(call("data", "served", "--log", tmp_path / "log", *arguments), "b.parquet is damaged")
    assert not (tmp_path / "made").exists()
