"""What metrics cost at scale: AUC by user of millions of users, a sample of a split, one more row in a long metrics.jsonl."""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.report import machine, machine_line, markdown
from ctrsink import strict_json
from ctrsink.config import parse_run
from ctrsink.evaluate.metrics import all_metrics, user_metrics
from ctrsink.stream.evaluation import drawn
from ctrsink.stream.order import Order
from ctrsink.train.observe.telemetry import Telemetry

KEYS = 30
"""Numbers in a row of metrics.jsonl, about."""


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("--users", nargs="*", type=int, default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--impressions", type=int, default=3, help="of a user, in the mean")
    parser.add_argument(
        "--sequences", nargs="*", type=int, default=[1_000_000, 10_000_000], help="of a split, of which 200 are drawn"
    )
    parser.add_argument("--rows", nargs="*", type=int, default=[1_000, 200_000], help="of metrics.jsonl")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    args = parser.parse_args()
    report = {
        "machine": machine(),
        "metrics": [of_users(count, args.impressions) for count in args.users],
        "sample": [of_sequences(count) for count in args.sequences],
        "flush": [of_rows(count) for count in args.rows],
    }
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def of_users(count: int, impressions: int) -> dict[str, Any]:
    """Seconds of the metrics by user and of all metrics, and the most memory so far."""
    chance = np.random.default_rng(0)
    users = np.sort(chance.integers(0, count, count * impressions))
    probabilities = chance.beta(2, 20, len(users))
    labels = (chance.random(len(users)) < probabilities).astype(np.int8)
    by_user = _seconds(lambda: user_metrics(labels, probabilities, users))
    whole = _seconds(lambda: all_metrics(labels, probabilities, users))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"users": count, "impressions": len(users), "by_user_s": by_user, "all_s": whole, "peak_gib": peak}


def of_sequences(count: int) -> dict[str, Any]:
    """Seconds of drawing 200 sequences, from 1,000 shards and from 16 of them, and of permuting all for it."""
    source: Any = SimpleNamespace(per_shard=(count // 1000,) * 1000)
    order = Order(source.per_shard, 0, 1000)
    return {
        "sequences": count,
        "of_16_s": _seconds(lambda: drawn(source, 200, 16)),
        "of_all_s": _seconds(lambda: drawn(source, 200)),
        "permuted_s": _seconds(lambda: order.ids(0, count)[:200]),
    }


def of_rows(count: int) -> dict[str, Any]:
    """Seconds that one more row takes of the training, and of the thread that writes, behind `count` rows that are there."""
    with tempfile.TemporaryDirectory() as folder:
        row = {f"metric/{number:02d}": 0.123456789 + number for number in range(KEYS)}
        lines = (strict_json.dumps({"step": step, "stage": "one", **row}) for step in range(1, count + 1))
        Path(folder, "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        telemetry = Telemetry(_run(folder), count)
        telemetry.flush().result()
        telemetry.add({"step": count + 1, "stage": "one", **row})
        began = time.perf_counter()
        flushed = telemetry.flush()
        training = time.perf_counter() - began
        flushed.result()
        whole = time.perf_counter() - began
        telemetry.close(finished=True)
        size = Path(folder, "metrics.jsonl").stat().st_size / 2**20
    return {"rows": count, "training_s": training, "thread_s": whole, "file_mib": size}


def text(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    metrics = [[row[key] for key in ("users", "impressions", "by_user_s", "all_s", "peak_gib")] for row in report["metrics"]]
    times = ("of_16_s", "of_all_s", "permuted_s")
    sample = [[f"{row['sequences']:,}", *(1000 * row[key] for key in times)] for row in report["sample"]]
    flush = [[f"{row['rows']:,}", 1000 * row["training_s"], 1000 * row["thread_s"], row["file_mib"]] for row in report["flush"]]
    parts = [machine_line(report["machine"])]
    if metrics:
        parts.append(markdown(("users", "impressions", "CPU s by user", "CPU s all metrics", "peak, GiB"), metrics))
    if sample:
        parts.append(markdown(("sequences", "CPU ms from 16 shards", "from all", "by a permutation"), sample))
    if flush:
        parts.append(markdown(("rows", "ms of training", "ms until written", "file, MiB"), flush))
    return "\n\n".join(parts)


def _seconds(work: Callable[[], object]) -> float:
    """Of a processor: other work on it counts nothing."""
    began = time.process_time()
    work()
    return time.process_time() - began


def _run(folder: str) -> Any:
    tree = {
        "name": "benchmark", "run_dir": folder, "data": {"uri": folder},
        "model": {"backbone": {"config": {"model_type": "qwen2"}}},
        "stages": [{"name": "one", "trainable": ["head"], "lr": {"head": 0.1}, "steps": 1}],
    }  # fmt: skip
    return parse_run(tree, "benchmark")


if __name__ == "__main__":
    raise SystemExit(main())
