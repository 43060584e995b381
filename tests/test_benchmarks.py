"""The benchmarks run as their README says, and tell every figure that they promise."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import loss_compare
from benchmarks.bridge_contestants import batch_of, contestant
from benchmarks.contestants import CONTESTANTS
from benchmarks.dense import DenseModel
from benchmarks.gpu_utilisation import PLAIN, backends
from benchmarks.impressions import read_samples, tensors, to_batch, write_parquet
from benchmarks.memory import resident
from benchmarks.model_training import PUBLISHED_FORM
from benchmarks.optional import installed
from benchmarks.report import markdown
from benchmarks.shapes import VOCABULARY, random_batch, random_spec, shape_of, trained_groups
from benchmarks.stream_figures import text
from ctrsink.config.data import DataSpec
from ctrsink.config.stages import Objective
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.families.decoder.build import build_model
from ctrsink.families.parameters import set_trainable
from ctrsink.families.registry import source_of
from tests.builders import make_dataset

MIB = 2**20


def run_benchmark(repository: Path, name: str, *arguments: object) -> dict[str, Any]:
    """The JSON object of a benchmark that must succeed."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *map(str, arguments)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_export_memory_tells_peaks_beside_the_bytes_of_the_folder(repository: Path) -> None:
    report = run_benchmark(repository, "export_memory", "--shapes", "test", "--trained", "LoRA, pretrained")
    (row,) = report["rows"]
    assert row["model"] > 0.1
    assert 0 < row["anonymous"] < row["peak"]


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


@pytest.mark.slow
def test_model_training_tells_the_rate_of_every_form_and_precision(tmp_path: Path, repository: Path) -> None:
    sizes = ["--events", 2000, "--history", 5, "--targets", 4, "--batch-size", 2, "--repeats", 2, "--seconds", 0.1]
    report = run_benchmark(repository, "model_training", "--model", "tiny-llama", "--threads", 1, "--work", tmp_path, *sizes)
    forms = get_args(DataSpec.model_fields["examples"].annotation)
    everybody = {(f, p) for f in forms for p in ("fp32", "bf16")} | {(PUBLISHED_FORM, "fp32")}
    assert {(row["examples"], row["precision"]) for row in report["speed"]} == everybody
    for row in report["speed"]:
        assert row["steps"] >= 2
        assert row["slowest"] <= row["impressions_per_s"] <= row["fastest"]
        assert row["tokens_per_s"] > row["impressions_per_s"]
        assert row["ratio_to_published"] is None  # the published rate is that of another model
        assert (row["ratio_to_form"] == 1) == (row["examples"] == PUBLISHED_FORM)
    rate = {row["examples"]: row["rounds"][0] for row in report["speed"]}
    assert rate[PUBLISHED_FORM]["impressions"] == 8 * rate[PUBLISHED_FORM]["steps"]
    assert rate["per_target"]["impressions"] == 2 * rate["per_target"]["steps"]
    assert rate["per_user"]["impressions"] > 2 * rate["per_user"]["steps"]


def test_bias_price_measures_every_contestant_on_the_same_behaviours(repository: Path) -> None:
    sizes = ["--history", 6, "--event-tokens", 3, "--batch-size", 2, "--warmup", 1, "--steps", 2, "--threads", 1]
    report = run_benchmark(repository, "bias_price", "--shape", "test", *sizes)
    rows = {row["contestant"]: row for row in report["steps"]}
    assert set(rows) == {"no sinks", "sinks", "sinks and bias", "sinks and dense bias"}
    assert rows["sinks"]["ratio"] == 1
    assert rows["no sinks"]["positions"] < rows["sinks"]["positions"] == rows["sinks and dense bias"]["positions"]
    assert all(0 < row["fastest"] <= row["s_per_step"] <= row["slowest"] for row in rows.values())


@pytest.mark.slow
def test_history_growth_stops_who_would_need_too_much_memory(repository: Path) -> None:
    sizes = ["--history", 4, 600, "--event-tokens", 9, "--batch-size", 4, "--steps", 1, "--threads", 1, "--memory-gib", 2]
    report = run_benchmark(repository, "history_growth", "--shape", "test", "--bias-layers", 1, *sizes)
    rows = {(row["contestant"], row["history"]): row for row in report["growth"]}
    assert set(rows) == {(who, n) for who in ("ours", "dense") for n in (4, 600)}
    assert rows["dense", 600]["peak_gib"] is None  # its masks alone are 4 x 6,016 squared floats in each layer
    assert 0 <= rows["ours", 4]["peak_gib"] < rows["ours", 600]["peak_gib"] < 2
    assert rows["ours", 4]["s_per_step"] < rows["ours", 600]["s_per_step"]


def test_bridge_measures_everybody_on_the_same_behaviours(repository: Path) -> None:
    sizes = ["--history", 6, "--event-tokens", 3, "--window", 4, "--steps", 1, "--threads", 1]
    report = run_benchmark(repository, "bridge", "--shape", "test", *sizes, "--contestants", "bridge", "din")
    ours, din = report["growth"]
    assert ours["time_ratio"] == ours["cpu_ratio"] == 1
    assert din["cpu_ratio"] == din["cpu_s_per_step"] / ours["cpu_s_per_step"]
    assert all(min(row["s_per_step"], row["gflops"]) > 0 for row in report["growth"])
    # A behaviour is its sink, or three tokens and its sink, or one row; the target is two tokens, or one row.
    expected = {"bridge": 6 + 2, "ctr-sink, bare": 6 + 2, "ctr-sink": 6 * 4 + 2, "din": 7}
    sparse = {"chunks": 4, "transition": 2, "window": 4}
    found = {name: batch_of(contestant(name, 6, "test", "blocks", sparse), 2, 3).tokens for name in expected}
    assert found == {name: 2 * rows for name, rows in expected.items()}
    assert (ours["rows"], din["rows"]) == (found["bridge"], found["din"])


def test_scoring_finds_the_same_probabilities_either_way(repository: Path) -> None:
    report = run_benchmark(repository, "scoring", "--shape", "test", "--history", 6, "--candidates", 5, "--repeats", 1)
    (row,) = report["scoring"]
    assert min(row["together"], row["apart"]) > 0
    assert row["largest_difference"] < 1e-5 < row["spread"]


def test_serving_engine_finds_the_same_probabilities_every_way(repository: Path) -> None:
    sizes = ("--history", 6, "--candidates", 5, "--requests", 2, "--alone", 2, "--threads", 1)
    report = run_benchmark(repository, "serving_engine", "--shape", "test", *sizes)
    found = report["models"]["test"]
    assert min(of["core_s"] for of in found["ways"].values()) > 0
    assert max(found["difference"].values()) < 1e-6
    assert found["counts"] | {"known_tokens": 0, "computed_tokens": 0} == {
        "hit": 3, "extended": 3, "missed": 3, "known_tokens": 0, "computed_tokens": 0,
    }  # fmt: skip
    assert 2 * found["bytes"]["sinks"] < found["bytes"]["all"]


@pytest.mark.slow
def test_forms_auc_tests_all_contestants_of_all_seeds(tmp_path: Path, repository: Path) -> None:
    log = tmp_path / "ml-1m"
    log.mkdir()
    chance = np.random.default_rng(0)
    times = np.sort(chance.integers(10**9, 10**9 + 10**6, 2000))
    rows = [f"{1 + i % 40}::{chance.integers(1, 30)}::{chance.integers(1, 6)}::{t}" for i, t in enumerate(times)]
    (log / "ratings.dat").write_text("\n".join(rows) + "\n")
    (log / "movies.dat").write_text("".join(f"{i}::Film {i} ({1950 + i})::Drama\n" for i in range(1, 31)))
    sizes = ["--seconds", 1, "--seeds", 2, "--history", 4, "--targets", 5, "--sample", 50]
    report = run_benchmark(repository, "forms_auc", log, *sizes)
    assert [run["seed"] for run in report["runs"]] == [0, 0, 0, 1, 1, 1]
    assert all(0 < run["auc"] < 1 for run in report["runs"])
    of = {run["contestant"]: run for run in report["runs"]}
    assert of["per_user, equal impressions"]["impressions"] >= of["per_target"]["impressions"]
    assert of["per_user, equal impressions"]["seconds"] < of["per_target"]["seconds"]
    assert all(row["interval"] >= 0 for row in report["summary"])


def test_gpu_utilisation_runs_on_a_cpu_and_tells_a_share_of_the_peak(repository: Path) -> None:
    sizes = ["--history", 5, "--batch-size", 2, "--warmup", 1, "--steps", 2]
    report = run_benchmark(repository, "gpu_utilisation", "--device", "cpu", "--shape", "test", *sizes)
    assert "sdpa" in backends()
    assert [row["contestant"] for row in report["steps"]] == ["sdpa", PLAIN]  # flex has no backward pass on a CPU
    for row in report["steps"]:
        assert 0 < row["utilisation"] < 1
        assert row["tokens"] == 2 * (5 * 10 + 8)  # behaviours with their sinks, and a target without feedback
    assert report["steps"][-1]["ratio_to_plain"] == 1


def test_balance_tells_a_steps_time_before_and_after(repository: Path, tmp_path: Path) -> None:
    forms = ["--forms", "per_target, history 50", "per_user, whole chronologies"]
    sizes = ["--shape", "test", "--ranks", 2, 3, "--micro-batch", 2, "--accumulation", 2, "--steps", 2]
    report = run_benchmark(repository, "balance", "--data", make_dataset(tmp_path, users=40), *forms, *sizes)
    assert [(row["form"], row["ranks"]) for row in report["rows"]] == [
        (form, ranks) for form in forms[1:] for ranks in (2, 2, 3, 3)
    ]
    for row in report["rows"]:
        times = [row[f"{wait}/{how}"] for wait in ("once", "each") for how in ("striped", "dealt")]
        assert min(times) >= 1
        assert row["once/gain"] == row["once/striped"] / row["once/dealt"]


def test_the_dense_form_computes_what_ours_does() -> None:
    spec = random_spec(shape_of("test") | {"initializer_range": 0.3}, True, 0.5)
    batch = random_batch(rows=3, history=6, event_tokens=3, sinks=True)
    answers, gradients = [], []
    for wrap in (lambda model: model, DenseModel):
        model = build_model(spec, VOCABULARY, 0)
        set_trainable(model, trained_groups(spec))
        biases = list(model.biases)
        out = wrap(model)(batch, Objective())
        out.loss.backward()
        answers.append(out.logits.detach())
        gradients.append(torch.cat([p.grad.flatten() for bias in biases for p in bias.parameters() if p.grad is not None]))
    assert torch.allclose(*answers, atol=1e-5)
    assert torch.allclose(*gradients, atol=1e-5)
    assert gradients[0].abs().max() > 1e-4  # the bias matters here


@pytest.mark.slow
def test_tiny_model_trains_with_one_and_two_workers(tmp_path: Path, repository: Path) -> None:
    sizes = ["--events", 2000, "--repeats", 1, "--warmup", 1, "--seconds", 0.1, "--work", tmp_path]
    report = run_benchmark(repository, "tiny_model", *sizes, "--workers", 1, 2, "--engine", "deepspeed", "torch, fused Adam")
    assert {(row["workers"], row["engine"]) for row in report["speed"]} == {
        (workers, engine) for workers in (1, 2) for engine in ("deepspeed", "torch, fused Adam")
    }
    assert all(row["tokens_per_s"] > row["impressions_per_s"] > 0 for row in report["speed"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signals", [(), ("previous_gap", "recency_rank")])
def test_samples_become_the_same_batch_as_ours(tmp_path: Path, signals: tuple[str, ...]) -> None:
    dataset = Dataset(make_dataset(tmp_path))
    source = source_of(dataset, "train", Layout("decoder", "per_target", 5, 1, signals, 10))
    total, start = sum(source.per_shard), 0
    for samples in read_samples(source, chunk=7):
        ids = np.arange(start, min(start + 7, total))
        ours, theirs = source.build(ids), to_batch(samples, len(signals))
        assert tensors(ours).keys() == tensors(theirs).keys()
        for name, tensor in tensors(ours).items():
            other = tensors(theirs)[name]
            assert other.dtype == tensor.dtype, name
            assert torch.equal(other, tensor), name
        # Samples hold no times, and without a temporal bias nothing reads them.
        assert (theirs.tokens, theirs.impressions, theirs.inputs.keys()) == (ours.tokens, ours.impressions, ours.inputs.keys())
        start += len(ids)
    assert start == total


def test_parquet_files_hold_every_impression_once(tmp_path: Path) -> None:
    source = source_of(Dataset(make_dataset(tmp_path)), "train", Layout("decoder", "per_target", 5, 1))
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


def test_evaluation_tells_what_metrics_and_rows_cost(repository: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.evaluation", "--users", "1000", "--rows", "100", "--sequences", "5000", "--json"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (metrics,), (flush,) = found["metrics"], found["flush"]
    assert metrics["impressions"] == 3000
    assert 0 < metrics["by_user_s"] < metrics["all_s"]
    assert 0 < flush["training_s"] < flush["thread_s"]


def test_a_table_aligns_its_columns() -> None:
    lines = markdown(["name", "rate"], [["a", 1234.5], ["longer", None]]).splitlines()
    assert lines == ["| name   |  rate |", "| ------ | ----: |", "| a      | 1,234 |", "| longer |     - |"]


def test_loss_compare_names_the_first_number_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two commits of a repository, each with code of its own."""
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "init", "-q"], check=True)
    for loss in ("0.1", "0.1000001"):
        (tmp_path / "loss").write_text(loss)
        subprocess.run(["git", "add", "loss"], check=True)
        subprocess.run([*git, "commit", "-qm", loss], check=True)
    monkeypatch.setattr(loss_compare, "_prepared", lambda *_: None)
    monkeypatch.setattr(
        loss_compare, "_numbers", lambda code, *_: ["step 1 loss 1.0", f"step 2 loss {(code / 'loss').read_text()}"]
    )
    same, other = (loss_compare.run(old, "HEAD", 10, 2, "blocks") for old in ("HEAD", "HEAD~1"))
    assert len(same["runs"]) == len(other["runs"]) == 12
    assert all(row["same"] == row["numbers"] == 2 and row["largest"] == 0 for row in same["runs"])
    assert all((row["same"], row["numbers"], row["largest"]) == (1, 2, pytest.approx(1e-6)) for row in other["runs"])
    assert {row["first"] for row in other["runs"]} == {"step 2 loss 0.1 / step 2 loss 0.1000001"}
    assert "|            1.0e-06 | step 2 loss 0.1 / step 2 loss 0.1000001 |" in loss_compare.text(other)
    assert subprocess.run(["git", "worktree", "list"], capture_output=True, text=True).stdout.count("\n") == 1
    with pytest.raises(InputError, match="no run has 'per_item' in its name; they are: per_target, sdpa, default"):
        loss_compare.run("HEAD", "HEAD", 10, 2, "per_item")


@pytest.mark.slow
def test_loss_compare_finds_a_commit_to_be_itself(repository: Path) -> None:
    sizes = ["--events", 2000, "--steps", 3, "--only", "per_user, blocks, default"]
    report = run_benchmark(repository, "loss_compare", "HEAD", "HEAD", *sizes)
    assert [(row["numbers"], row["same"]) for row in report["runs"]] == [(10, 10)]
