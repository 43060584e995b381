"""Requests of any number: the same scores as of a small file, in the same order, nothing lost by an interruption."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink import storage
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.export.package import export_run
from ctrsink.prepare.execute import in_process
from ctrsink.runtime.score import score_on_ray
from ctrsink.scoring.blocks import cut_files
from ctrsink.scoring.files import request_files
from ctrsink.scoring.job import ScoreJob
from ctrsink.scoring.reader import Reader
from ctrsink.serve import request_of, score_file
from ctrsink.serve.scorer import Scorer
from tests.command_line import call, content, good, refused
from tests.services.ray_cluster import RayCluster
from tests.serving_fixtures import prepared, run_spec, write_run

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scoring")
    data = prepared(folder)
    spec = run_spec(data, str(folder / "run"))
    write_run(spec)
    export_run(spec.run_dir, str(folder / "model"))
    dataset = Dataset(data.uri)
    requests = [request_of(dataset, user, event, [0, 1, event]) for event in range(1, 6) for user in range(5)]
    lines = [json.dumps(request | {"id": number}) for number, request in enumerate(requests)]
    (folder / "requests.jsonl").write_text("\n".join(lines) + "\n")
    score_file(str(folder / "model"), str(folder / "requests.jsonl"), str(folder / "scores.jsonl"))
    return str(folder / "model")


@pytest.fixture
def lines(model: str) -> list[str]:
    """25 requests, whose ids are their numbers."""
    return Path(model).with_name("requests.jsonl").read_text().splitlines()


@pytest.fixture
def expected(model: str) -> Rows:
    """Their scores as of one small file."""
    return [json.loads(line) for line in Path(model).with_name("scores.jsonl").read_text().splitlines()]


def rows_of(folder: Path) -> Rows:
    """What the parts hold, in the order of their names; without what is null in Parquet."""
    found: Rows = []
    for path in sorted(folder.glob("part-*")):
        if path.suffix == ".jsonl":
            found += map(json.loads, path.read_text().splitlines())
        else:
            table: Rows = pq.read_table(path).to_pylist()
            found += [{key: value for key, value in row.items() if value is not None} for row in table]
    return found


def as_table(lines: list[str]) -> pa.Table:
    return pa.Table.from_pylist([json.loads(line) for line in lines])


def write_mixed(folder: Path, lines: list[str]) -> Path:
    """The requests as four files of every kind."""
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(lines[:9]) + "\n \n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(("\n".join(lines[9:15])).encode()) + gzip.compress(b"\n"))
    pq.write_table(as_table(lines[15:22]), folder / "c.parquet", row_group_size=5)
    (folder / "d.ndjson").write_text("\n".join(lines[22:]))
    (folder / "_SUCCESS").touch()
    return folder


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_files_of_every_kind_score_as_one_small_file(
    model: str, lines: list[str], expected: Rows, tmp_path: Path, form: str
) -> None:
    mixed = write_mixed(tmp_path / "in", lines)
    score = ["score", "--model", model, "--output", f"{tmp_path}/out/", "--parts", form, "--block-bytes", 3000]
    counts = good(*score, "--input", mixed)
    assert counts["requests"] == 25
    assert counts["candidates"] == 75
    assert counts["parts"] == len(list((tmp_path / "out").glob(f"part-*.{form}"))) >= 8
    found = rows_of(tmp_path / "out")
    # A file of text that has whole numbers as ids gives text in Parquet.
    assert [int(row.pop("id")) for row in found] == [row.pop("id") for row in expected]
    assert found == expected
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text())["requests"] == 25


@settings(max_examples=15)
@given(block_bytes=st.integers(1, 30_000), group=st.integers(1, 30), order=st.randoms(use_true_random=False))
def test_blocks_hold_every_request_once_whoever_reads_them(
    lines_of: list[str], tmp_path_factory: pytest.TempPathFactory, block_bytes: int, group: int, order: Any
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    (folder / "a.jsonl").write_text("\n".join(lines_of) + "\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines_of).encode()))
    pq.write_table(as_table(lines_of), folder / "c.parquet", row_group_size=group)
    files = request_files(str(folder))
    blocks = cut_files(files, block_bytes)
    whole = [line for block in blocks for line in Reader(files).read(block)]
    assert [line.tree["id"] for line in whole] == [*range(len(lines_of))] * 3
    reader, shuffled = Reader(files), list(enumerate(blocks))
    order.shuffle(shuffled)
    found = {number: [(reader.place(line.where, block), line.tree) for line in reader.read(block)] for number, block in shuffled}
    together = [pair for number in range(len(blocks)) for pair in found[number]]
    assert [tree for _, tree in together] == [line.tree for line in whole]
    kinds = (("a.jsonl", "line"), ("b.jsonl.gz", "line"), ("c.parquet", "row"))
    places = [f"{folder}/{name}, {unit} {n}" for name, unit in kinds for n in range(1, len(lines_of) + 1)]
    assert [where for where, _ in together] == places


@pytest.fixture(scope="module")
def lines_of(model: str) -> list[str]:
    return Path(model).with_name("requests.jsonl").read_text().splitlines()


def test_a_second_call_does_what_is_missing(model: str, lines: list[str], expected: Rows, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    job = ScoreJob(model, str(tmp_path / "in.jsonl"), str(tmp_path / "out"), "jsonl", block_bytes=3000)

    def interrupted(task: Any, numbers: Any) -> Any:
        for done, number in enumerate(numbers):
            if done == 3:
                raise KeyboardInterrupt
            yield task(number)

    with pytest.raises(KeyboardInterrupt):
        job.run(interrupted)
    before = content(tmp_path / "out")
    assert len([name for name in before if name.startswith("part-")]) == 3
    ran: list[int] = []
    assert job.run(lambda task, numbers: (ran.extend(numbers), in_process(task, numbers))[1])["requests"] == 25
    assert ran == list(range(3, ran[-1] + 1))
    assert rows_of(tmp_path / "out") == expected
    after = content(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    ran.clear()
    job.run(lambda task, numbers: (ran.extend(numbers), in_process(task, numbers))[1])
    assert (ran, content(tmp_path / "out")) == ([], after)


def test_scores_of_something_else_are_not_gone_on_with(model: str, lines: list[str], tmp_path: Path) -> None:
    mixed = write_mixed(tmp_path / "in", lines)
    score = ["score", "--model", model, "--input", mixed, "--output", tmp_path / "out", "--parts", "jsonl"]
    good(*score)
    before = content(tmp_path / "out")
    refused(call(*score, "--block-bytes", 3000), "out holds scores of block_bytes 4194304, not 3000: choose another folder")
    refused(call(*score[:-1], "parquet"), "out holds scores of parts jsonl, not parquet")
    (mixed / "e.jsonl").write_text(lines[0])
    refused(call(*score), f"out holds scores of another input ({mixed}/e.jsonl is new or has changed)")
    (mixed / "e.jsonl").unlink()
    (mixed / "d.ndjson").rename(tmp_path / "d.ndjson")
    refused(call(*score), f"another input ({mixed}/d.ndjson is gone)")
    (tmp_path / "d.ndjson").rename(mixed / "d.ndjson")
    assert good(*score)["requests"] == 25
    config = Path(model) / "config.json"
    text = config.read_text()
    try:
        config.write_text(text + " ")
        refused(call(*score), "another model (config.json is new or has changed)")
    finally:
        config.write_text(text)
    assert content(tmp_path / "out") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    refused(call(*score[:6], tmp_path / "other"), "other holds something else than scores")


def test_a_bad_request_is_named_by_its_line_in_the_file(model: str, lines: list[str], expected: Rows, tmp_path: Path) -> None:
    late = json.dumps(json.loads(lines[17]) | {"timestamp": 5})
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:12], "{", *lines[13:17], late, *lines[18:]]) + "\n")
    score = ["score", "--model", model, "--input", tmp_path / "in.jsonl", "--output", f"{tmp_path}/out/", "--block-bytes", 3000]
    hint = f"what was scored stays in {tmp_path}/out, and --on-bad-request skip goes on with it"
    refused(call(*score), f"{tmp_path}/in.jsonl, line 13: not a JSON object", hint)
    some = rows_of(tmp_path / "out")
    assert 0 < len(some) < 13
    skipping = call(*score, "--on-bad-request", "skip", "--json")
    assert skipping.code == 0, skipping.err
    assert "skipped 2 of 25 requests; the first: " in skipping.err
    assert {key: skipping.json[key] for key in ("requests", "candidates", "skipped")} == {
        "requests": 23, "candidates": 69, "skipped": 2,
    }  # fmt: skip
    found = rows_of(tmp_path / "out")
    assert f"{tmp_path}/in.jsonl, line 13: not a JSON object" in found[12]["error"]
    assert found[17]["error"].startswith(f"{tmp_path}/in.jsonl, line 18: history.0.timestamp ")
    assert [row for n, row in enumerate(found) if n not in (12, 17)] == [
        row for n, row in enumerate(expected) if n not in (12, 17)
    ]
    refused(call(*score), "out has 2 requests that an earlier call skipped; the first: ")
    (tmp_path / "none.jsonl").write_text("{\n[]\n")
    none = ["score", "--model", model, "--input", tmp_path / "none.jsonl", "--output", f"{tmp_path}/no/"]
    refused(call(*none), "none.jsonl, line 1: not a JSON object")
    assert not (tmp_path / "no").exists()


def test_parquet_of_pandas_and_spark_is_read(model: str, lines: list[str], expected: Rows, tmp_path: Path) -> None:
    """Moments as timestamps, text in dictionaries, items as maps, ids that are text."""
    requests = [json.loads(line) for line in lines[:4]]
    item = pa.map_(pa.string(), pa.string())
    moment = pa.timestamp("s")
    behaviour = pa.struct({"item": item, "feedback": pa.float64(), "timestamp": moment})

    def texts(row: dict[str, Any]) -> list[tuple[str, str]]:
        return [(key, value) for key, value in row.items() if isinstance(value, str)]

    history = [
        [{"item": texts(b["item"]), "feedback": b["feedback"], "timestamp": int(b["timestamp"])} for b in r["history"]]
        for r in requests
    ]
    table = pa.table(
        {
            "id": pa.array([f"no {r['id']}" for r in requests]).dictionary_encode(),
            "history": pa.array(history, pa.list_(behaviour)),
            "candidates": pa.array([[texts(c) for c in r["candidates"]] for r in requests], pa.list_(item)),
            "timestamp": pa.array([int(r["timestamp"]) for r in requests], moment),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    good("score", "--model", model, "--input", tmp_path / "in.parquet", "--output", tmp_path / "out")
    assert pq.read_schema(tmp_path / "out" / "part-000000.parquet").field("id").type == pa.string()
    assert rows_of(tmp_path / "out") == [row | {"id": f"no {row['id']}"} for row in expected[:4]]


def test_places_that_hold_no_requests_are_refused(model: str, lines: list[str], tmp_path: Path) -> None:
    mixed = write_mixed(tmp_path / "in", lines)

    def told(place: object, *more: object) -> str:
        return refused(call("score", "--model", model, "--input", place, *more))

    assert f"{mixed} is scored by blocks, into a folder: give --output DIR/" in told(mixed)
    to = ("--output", f"{tmp_path}/out/")
    assert "none does not exist" in told(tmp_path / "none", *to)
    assert "no file fits this pattern" in told(f"{mixed}/*.json", *to)
    (mixed / "x.csv").write_text("a,b\n1,2\n")
    assert "x.csv: requests are nested, so a file of them is .jsonl (also .gz) or .parquet" in told(mixed, *to)
    (mixed / "x.csv").rename(mixed / "x.txt")
    assert "x.txt: a table is" in told(mixed, *to)
    (tmp_path / "cut.jsonl.gz").write_bytes((mixed / "b.jsonl.gz").read_bytes()[:-20])
    assert "cut.jsonl.gz is not a whole gzip file" in told(tmp_path / "cut.jsonl.gz", *to)
    (tmp_path / "cut.parquet").write_bytes((mixed / "c.parquet").read_bytes()[:-20])
    assert "cut.parquet is not a whole parquet file" in told(tmp_path / "cut.parquet", *to)
    pq.write_table(pa.table({"id": [1.5]}), tmp_path / "id.parquet")
    assert "the column id is of the type double: make it text or whole numbers" in told(tmp_path / "id.parquet", *to)
    assert "--device cuda" in told(mixed / "a.jsonl", "--device", "cuda")
    assert not (tmp_path / "out").exists()


def test_ray_data_scores_from_s3_to_s3(
    model: str, lines: list[str], expected: Rows, tmp_path: Path, ray_cluster: RayCluster
) -> None:
    """Twice by actors that have joined a cluster: the second call has nothing left to do; then with a bad request."""
    mixed, place = write_mixed(tmp_path / "in", lines), "s3://ctrsink-test/scoring"
    storage.upload_dir(mixed, f"{place}/in")
    storage.upload_dir(model, f"{place}/model")
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:20], "{", *lines[21:]]))
    storage.upload(tmp_path / "bad.jsonl", f"{place}/bad.jsonl")
    common = ["--model", f"{place}/model", "--block-bytes", "3000", "--on", "ray", "--workers", "2", "--parts", "parquet"]
    common += ["--address", ray_cluster.gcs_address, "--json"]
    calls = [
        ["score", "--input", f"{place}/in/*", "--output", f"{place}/out/", *common],
        ["score", "--input", f"{place}/in/*", "--output", f"{place}/out/", *common],
        ["score", "--input", f"{place}/bad.jsonl", "--output", f"{place}/bad/", *common],
    ]
    program = "import json, sys; from ctrsink.cli import main\nfor c in json.loads(sys.argv[1]): print('exit code', main(c))"
    environment = os.environ | ray_cluster.env() | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(calls)], env=environment, capture_output=True, text=True, timeout=300
    )
    shown = done.stdout.splitlines()
    assert [line for line in shown if line.startswith("exit code")] == ["exit code 0", "exit code 0", "exit code 2"], done.stderr
    assert [json.loads(shown[n])["requests"] for n in (0, 2)] == [25, 25]
    assert f"{place}/bad.jsonl, line 21: not a JSON object" in shown[4]
    storage.download_dir(f"{place}/out", tmp_path / "out")
    found = rows_of(tmp_path / "out")
    assert [int(row.pop("id")) for row in found] == [row.pop("id") for row in expected]
    assert found == expected


def test_relative_places_mean_nothing_on_a_cluster(model: str, lines: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                  ray_cluster: RayCluster) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text(lines[0])
    score = ["score", "--model", model, "--input", "in.jsonl", "--output", "out/", "--on", "ray"]
    refused(call(*score, "--address", ray_cluster.gcs_address), "--input in.jsonl is relative, which means nothing on a cluster")


def test_a_model_exported_anew_is_loaded_anew(
    model: str, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = [], Scorer.load
    monkeypatch.setattr(Scorer, "load", lambda *of: (loaded.append(of), load(*of))[1])
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "in.jsonl").write_text(lines[0])
    for number in range(2):
        ScoreJob(str(tmp_path / "model"), str(tmp_path / "in.jsonl"), str(tmp_path / f"out{number}")).run(in_process)
        os.utime(tmp_path / "model" / "config.json", (1, 1))
    assert len(loaded) == 2


def test_a_file_that_is_gone_or_shorter_is_told(model: str, lines: list[str], tmp_path: Path) -> None:
    mixed = write_mixed(tmp_path / "in", lines)
    files = request_files(str(mixed))
    blocks = cut_files(files, 3000)
    for path in mixed.iterdir():
        path.write_bytes(b"")
    for block in blocks:
        with pytest.raises(InputError, match=r"shorter|not a whole|is empty"):
            Reader(files).read(block)


def test_parts_of_several_files_are_one_table(model: str, lines: list[str], tmp_path: Path) -> None:
    write_mixed(tmp_path / "in", lines)
    good("score", "--model", model, "--input", tmp_path / "in", "--output", f"{tmp_path}/out/", "--parts", "parquet")
    assert pq.read_table(tmp_path / "out").column("id").to_pylist() == [str(number) for number in range(25)]
    good("score", "--model", model, "--input", tmp_path / "in" / "c.parquet", "--output", f"{tmp_path}/c/")
    assert pq.read_table(tmp_path / "c").column("id").to_pylist() == list(range(15, 22))


def test_what_a_request_holds_does_not_end_the_job(model: str, lines: list[str], tmp_path: Path) -> None:
    half = json.dumps(json.loads(lines[0]) | {"id": "\ud800"})
    (tmp_path / "in.jsonl").write_text("\n".join([half, lines[1]]))
    score = ["score", "--model", model, "--input", tmp_path / "in.jsonl", "--output", f"{tmp_path}/out/", "--parts", "parquet"]
    refused(call(*score), "in.jsonl, line 1: id '\\ud800' has half of a pair of surrogates")
    assert good(*score, "--on-bad-request", "skip")["skipped"] == 1
    pq.write_table(pa.table({"id": [1], "history": [7]}), tmp_path / "in.parquet")
    refused(call(*score[:3], "--input", tmp_path / "in.parquet", "--output", f"{tmp_path}/no/"), "in.parquet, row 1: history")


def test_an_interrupted_reader_starts_anew(lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    files = request_files(str(tmp_path))
    blocks, reader = cut_files(files, 3000), Reader(files)

    def interrupted(*of: object) -> None:
        raise KeyboardInterrupt

    reader.read(blocks[0])
    with monkeypatch.context() as patch:
        patch.setattr("ctrsink.scoring.reader.parse_lines", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reader.read(blocks[1])
    assert reader._packed is None
    assert reader.read(blocks[1]) == Reader(files).read(blocks[1])


def test_places_of_a_job(model: str, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = write_mixed(tmp_path / "in", lines)
    for to in ("in", "in/out"):
        with pytest.raises(InputError, match="lies in the input"):
            ScoreJob(model, str(mixed), str(tmp_path / to)).run(in_process)
    job = ScoreJob(model, f"{mixed}/a.jsonl", str(tmp_path / "out"))

    def changing(task: Any, numbers: Any) -> Any:
        for number in in_process(task, numbers):
            (mixed / "a.jsonl").write_text(lines[0])
            yield number

    with pytest.raises(InputError, match="input changed while it was scored"):
        job.run(changing)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    monkeypatch.chdir(mixed)
    again = replace(job, to=str(tmp_path / "again"))
    again.run(in_process)
    replace(again, input="a.jsonl").run(in_process)
    with pytest.raises(InputError, match=r"--address 127\.0\.0\.1:1: Connection refused"):
        score_on_ray(job, "127.0.0.1:1", 1, 1)
