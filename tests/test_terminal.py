"""What a terminal shows: scores and nothing else on stdout, results with their indentation, refusals before torch is imported."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from ctrsink.cli import _text
from ctrsink.errors import InputError
from ctrsink.run import presence
from ctrsink.serve import score_file
from tests.command_line import call, content, good, refused
from tests.runs import prepared_data, run_tree

REQUEST: dict[str, Any] = {
    "history": [{"item": {"title": "Oak", "genres": "Drama"}, "feedback": 4, "timestamp": 10}],
    "candidates": [{"title": "Oak", "genres": "Drama"}, {"title": "Tea", "genres": ""}],
    "timestamp": 20,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two steps; its exported model is `model` beside it, its configuration `run.yaml`."""
    folder = tmp_path_factory.mktemp("terminal")
    tree = run_tree(prepared_data(str(folder / "data")), str(folder / "run"))
    tree["prepare"] = {"source": {"path": str(folder)}, "tokenizer": {"train_vocabulary": 300}}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    good("train", "--config", folder / "run.yaml", "stages.0.steps=1", "stages.1.steps=1", "evaluate.splits=[valid]")
    good("export", "--run", folder / "run", "--to", folder / "model")
    return folder / "run"


def requests_file(folder: Path, *lines: str, end: str = "\n") -> Path:
    (folder / "requests.jsonl").write_text("\n".join(lines) + end)
    return folder / "requests.jsonl"


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n", "\n  \n\t\r\n"])
def test_scores_are_all_that_stdout_holds(run: Path, tmp_path: Path, end: str) -> None:
    score = ["score", "--model", run.parent / "model", "--input", requests_file(tmp_path, json.dumps(REQUEST), end=end)]
    shown = call(*score)
    assert shown.code == 0, shown.err
    (row,) = map(json.loads, shown.out.splitlines())
    assert row.keys() == {"probabilities"}
    assert "requests: 1, candidates: 2" in shown.err
    written = call(*score, "--output", tmp_path / "out.jsonl")
    assert written.out == "requests: 1\ncandidates: 2\n"
    assert (tmp_path / "out.jsonl").read_text() == shown.out


def test_an_empty_line_between_requests_is_a_mistake(run: Path, tmp_path: Path) -> None:
    path = requests_file(tmp_path, json.dumps(REQUEST), "", json.dumps(REQUEST))
    refused(call("score", "--model", run.parent / "model", "--input", path), f"{path}, line 2: not a JSON object")
    empty = requests_file(tmp_path, "", " ")
    refused(call("score", "--model", run.parent / "model", "--input", empty), "is empty: give one request")


def test_bad_requests_are_skipped_when_asked_and_say_so_in_their_place(run: Path, tmp_path: Path) -> None:
    no_title = json.dumps({"id": 3, **REQUEST, "candidates": [{"genres": "Drama"}]})
    late = json.dumps({"id": 4, **REQUEST, "timestamp": 5})
    deep = "[" * 100_000
    lines = ["{", json.dumps({"id": 2, **REQUEST}), no_title, late, deep, json.dumps(REQUEST)]
    path = requests_file(tmp_path, *lines)
    score = ["score", "--model", run.parent / "model", "--input", path]
    line = refused(call(*score), f"{path}, line 1: not a JSON object")
    assert len(line) < 400
    result = call(*score, "--on-bad-request", "skip", "--json")
    assert result.code == 0, result.err
    assert result.json == {"requests": 2, "candidates": 4, "skipped": 4}
    rows = [json.loads(line) for line in result.out.splitlines()[:-1]]
    assert [row.get("id") for row in rows] == [None, 2, 3, 4, None, None]
    assert ["probabilities" in row for row in rows] == [False, True, False, False, False, True]
    assert [f"line {number}: " in row.get("error", "") for number, row in enumerate(rows, 1)] == ["error" in row for row in rows]
    assert "skipped 4 of 6 requests; the first: " in result.err
    assert rows[1]["probabilities"] == rows[5]["probabilities"]


def test_where_no_request_is_good_nothing_is_written(run: Path, tmp_path: Path) -> None:
    path = requests_file(tmp_path, "{", "[]")
    score = ["score", "--model", run.parent / "model", "--input", path, "--output", tmp_path / "out", "--on-bad-request", "skip"]
    refused(call(*score), f"none of 2 requests can be scored; the first: {path}, line 1: not a JSON object")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="line 1: not a JSON object"):
        score_file(str(run.parent / "model"), str(path))


def test_results_are_printed_with_their_indentation(run: Path) -> None:
    shown = call("evaluate", "--run", run, "--split", "valid").out.splitlines()
    assert shown[0] == f"run_dir: {run}"
    assert shown[1:3] == ["evaluation: ", "  valid: "]
    assert all(line.startswith("    ") and not line.startswith("     ") for line in shown[3:])
    assert len(shown) > 6
    assert _text({"a": {"b": {"c": 1.0}}, "d": 2}) == "\n  a: \n    b: \n      c: 1\n  d: 2"


def test_a_configuration_is_shown_without_an_empty_line(run: Path) -> None:
    assert call("config", "show", run.parent / "run.yaml").out.splitlines()[-1].strip()


def test_nobody_is_asked_to_stop(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "PERIOD_S", 0.1)
    before = content(run)
    line = f"nobody trains {run}, so there is nothing to stop: `ctrsink train --resume` goes on"
    refused(call("stop", "--run", run), line)
    assert content(run) == before
    # One who was killed left his sign behind.
    (run / "held-by.json").write_text(json.dumps({"host": "h", "process": 1, "token": "x", "beat": 7}))
    refused(call("stop", "--run", run), line)
    (run / "held-by.json").unlink()
    assert content(run) == before
    refused(call("stop", "--run", run.parent / "none"), "holds no run")


def test_one_who_lives_is_asked_to_stop(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "PERIOD_S", 0.2)
    with presence.held(str(run)):
        asked = good("stop", "--run", run)
        assert asked["requested"].startswith("of process ")
        assert (run / "stop-requested").read_text() == "ctrsink stop"
    (run / "stop-requested").unlink()


def test_one_who_stops_before_he_gives_another_sign_was_not_nobody(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "PERIOD_S", 1.0)
    sign = run / "held-by.json"
    sign.write_text(json.dumps({"host": "h", "process": 7, "token": "x", "beat": 7}))
    ending = threading.Timer(0.5, sign.unlink)
    ending.start()
    assert good("stop", "--run", run)["requested"].startswith("of process 7 on host h: ")
    ending.join()
    (run / "stop-requested").unlink()


def test_what_can_be_refused_without_torch_is(run: Path, tmp_path: Path) -> None:
    folder, config = run.parent, run.parent / "run.yaml"
    not_json = requests_file(tmp_path, "{")
    commands = [
        ["data", "prepare", "--config", config],
        ["data", "prepare", "--config", config, "--to", tmp_path / "new", f"prepare.source.path={tmp_path / 'none.csv'}"],
        ["data", "append", "--config", config, "--to", tmp_path / "none"],
        ["data", "inspect", config],
        ["data", "inspect", tmp_path / "none"],
        ["data", "verify", tmp_path / "none"],
        ["train", "--config", config],
        ["train", "--config", config, f"run_dir={tmp_path / 'new'}", f"data.uri={tmp_path / 'none'}"],
        ["train", "--config", config, f"run_dir={tmp_path / 'new'}", "runtime.kind=ray", "runtime.address=127.0.0.1:1"],
        ["train", "--config", config, "train.batch_sze=4"],
        ["config", "show", config, "train.batch_sze=4"],
        ["evaluate", "--run", tmp_path / "none"],
        ["export", "--run", tmp_path / "none", "--to", tmp_path / "model"],
        ["stop", "--run", run],
        ["score", "--model", folder / "model", "--input", tmp_path / "none"],
        ["score", "--model", folder / "model", "--input", not_json],
        ["score", "--model", tmp_path / "none", "--input", config],
        ["submit", "--config", config, "--working-dir", folder, "--address", "nowhere"],
    ]
    program = (
        "import json, sys, time; from ctrsink.cli import main\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    began = time.process_time(); code = main(command)\n"
        "    print(code, 'torch' in sys.modules, time.process_time() - began < 2)\n"
    )
    arguments = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", program, arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert shown == ["2 False True"] * len(commands), list(zip(commands, shown, strict=False))
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("n*"))
