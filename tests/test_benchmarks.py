"""The benchmarks run as their README says, and tell every figure that they promise."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.contestants import CONTESTANTS
from benchmarks.impressions import read_samples, to_batch, write_parquet
from benchmarks.memory import resident
from benchmarks.optional import installed
from benchmarks.report import markdown
from benchmarks.stream_figures import text
from ctrsink.config.data import Signal
from ctrsink.data.dataset import Dataset
from ctrsink.data.examples import Layout
from ctrsink.data.stream import SequenceSource
from tests.builders import make_dataset

MIB = 2**20


def run_benchmark(repository: Path, name: str, *arguments: object) -> dict[str, Any]:
    """The JSON object of a benchmark that must succeed."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *map(str, arguments)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_data_stream_tells_speed_first_batch_bytes_and_memory(tmp_path: Path, repository: Path) -> None:
    sizes = ["--events", 3000, "--repeats", 1, "--workers", 0, "--warmup", 2, "--seconds", 0.2, "--memory-batches", 2, 8]
    report = run_benchmark(repository, "data_stream", *sizes, "--sinks", "on", "--work", tmp_path)
    present = {name for name, (_, package) in CONTESTANTS.items() if package is None or installed(package)}
    assert set(report["not_installed"]) == set(CONTESTANTS) - present
    assert report["checked_impressions"] == dict.fromkeys(present, 128)
    assert {row["contestant"] for row in report["speed"]} == present
    assert {row["contestant"] for row in report["first_batch"]} == present
    for row in [*report["speed"], *report["first_batch"]]:
        assert all(value > 0 for name, value in row.items() if name not in ("contestant", "workers"))
    assert (report["ratio"] is None) == (present == {"ctrsink"})
    assert report["bytes"]["ctrsink"] > 0
    assert list(report["memory"]["bytes_after_batches"]) == ["2", "8"]
    assert report["machine"]["cores"] > 0
    assert list(tmp_path.iterdir()) == []

    told = text(report)
    for name in CONTESTANTS:
        assert f"| {name} " in told or f"not measured: {name}" in told
    for heading in ("Impressions per second", "Seconds to the first batch", "Bytes on disk", "Resident memory"):
        assert f"## {heading}" in told


def test_data_stream_refuses_a_log_that_the_warm_up_would_use_up(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.data_stream", "--events", "300", "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 2
    assert "too few" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_data_prepare_tells_speed_and_memory_and_finds_the_same_bytes(tmp_path: Path, repository: Path) -> None:
    report = run_benchmark(
        repository,
        "data_prepare",
        "--events",
        2000,
        3000,
        "--same-events",
        2500,
        "--workers",
        1,
        "--period",
        0.1,
        "--work",
        tmp_path,
    )
    assert [size["events"] for size in report["sizes"]] == [2000, 3000]
    for size in report["sizes"]:
        assert size["seconds"] > 0
        assert size["peak_bytes"] > 50 * MIB  # no Python with numpy and pyarrow is smaller
        assert size["data_bytes"] > 0
    assert report["same"]["identical"] is True
    assert [way["workers"] for way in report["same"]["ways"]] == [1, 2, 3]
    assert len({way["block_bytes"] for way in report["same"]["ways"]}) == 3
    assert {len(way["manifest_sha256"]) for way in report["same"]["ways"]} == {64}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signals", [(), ("previous_gap", "recency_rank")])
def test_samples_become_the_same_batch_as_ours(tmp_path: Path, signals: tuple[Signal, ...]) -> None:
    dataset = Dataset(make_dataset(tmp_path))
    source = SequenceSource(dataset, "train", Layout("per_target", 5, 1, signals, 10))
    total, start = sum(source.per_shard), 0
    for samples in read_samples(source, chunk=7):
        ids = np.arange(start, min(start + 7, total))
        ours, theirs = source.build(ids), to_batch(samples, len(signals))
        for name, tensor in vars(ours).items():
            other = getattr(theirs, name)
            assert other.dtype == tensor.dtype, name
            assert torch.equal(other, tensor), name
        start += len(ids)
    assert start == total


def test_parquet_files_hold_every_impression_once(tmp_path: Path) -> None:
    source = SequenceSource(Dataset(make_dataset(tmp_path)), "train", Layout("per_target", 5, 1))
    total = sum(source.per_shard)
    write_parquet(tmp_path / "parquet", read_samples(source, chunk=7), total)
    tables = [pq.read_table(path) for path in sorted((tmp_path / "parquet").iterdir())]
    events = [pair for table in tables for pair in zip(table["user"].to_pylist(), table["event"].to_pylist(), strict=True)]
    assert len(events) == len(set(events)) == total
    assert len(tables) > 1


def test_resident_memory_counts_a_page_of_two_processes_once(tmp_path: Path) -> None:
    program = """
import mmap, os, sys
with open(sys.argv[1], "r+b") as file:
    held = mmap.mmap(file.fileno(), 0)
touched, done = os.pipe()
child = os.fork()
held[::4096]
if child:
    os.read(touched, 1)
    print("ready", flush=True)
else:
    os.write(done, b"x")
sys.stdin.read()
"""
    (tmp_path / "pages").write_bytes(bytes(64 * MIB))
    command = [sys.executable, "-c", program, str(tmp_path / "pages")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        found = resident(process.pid)
        process.communicate()
    assert 64 * MIB < found < 128 * MIB


def test_a_table_aligns_its_columns() -> None:
    lines = markdown(["name", "rate"], [["a", 1234.5], ["longer", None]]).splitlines()
    assert lines == ["| name   |  rate |", "| ------ | ----: |", "| a      | 1,234 |", "| longer |     - |"]
