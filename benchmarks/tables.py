"""What a step of a table of embeddings costs, by its number of rows; memory, and a checkpoint of it; on CPU workers.

The same 20,000 rows a step are looked up, have gradients and are stepped, in tables of 10^5 to 10^7 rows that two workers share.
Beside it a table that PyTorch holds whole: `nn.Embedding` under AdamW, in one process, whose step touches every row.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.report import machine, machine_line, markdown
from ctrsink import strict_json
from ctrsink.dist import Topology, barrier
from ctrsink.tables.embedding import ShardedEmbedding
from ctrsink.tables.files import read_tables, save_tables
from ctrsink.tables.shares import bytes_needed

MIB = 2**20
WARM_UP = 3
LEARNING_RATE = 0.01


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    torch.set_num_threads(1)
    if args.worker is not None:
        print(json.dumps(_worker(args)), flush=True)
        return 0
    report = run(args)
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--whole-rows", type=int, default=1_000_000, help="of the table that PyTorch holds whole")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--touched", type=int, default=20_000, help="different rows of a step, of all workers")
    parser.add_argument("--steps", type=int, default=30, help="of each; the median is told")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", metavar="DIR", help="where the tables are written and removed (default: $TMPDIR)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every size in processes of its own, so that each has a peak of memory of its own; returns all figures."""
    found, rows = machine(), []
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for count in args.rows:
            workers = _started(args, count, args.workers, folder)
            needed = bytes_needed(count, args.width, args.workers)
            rows.append({"table": "ours", "rows": count, "workers": args.workers, "needed_bytes": needed, **together(workers)})
        whole = _started(args, args.whole_rows, 0, folder)
        rows.append({"table": "nn.Embedding, AdamW", "rows": args.whole_rows, "workers": 1, **together(whole)})
    by_rows = {row["rows"]: row["step_s"] for row in rows if row["table"] == "ours"}
    settings = {name: getattr(args, name) for name in ("width", "touched", "steps", "workers")}
    return {"machine": found, "settings": settings, "tables": rows, "ratio": by_rows[max(by_rows)] / by_rows[min(by_rows)]}


def _started(args: argparse.Namespace, rows: int, workers: int, folder: str) -> list[dict[str, Any]]:
    """What each worker measured; with no workers, one that holds a table of PyTorch's."""
    command = [sys.executable, "-m", "benchmarks.tables", "--rows", str(rows), "--workers", str(workers), "--work", folder]
    command += ["--store", f"{folder}/store-{rows}", "--width", str(args.width)]
    command += ["--touched", str(args.touched), "--steps", str(args.steps)]
    return of_workers(command, max(1, workers))


def of_workers(command: list[str], workers: int) -> list[dict[str, Any]]:
    """What each of so many processes printed as its last line; they are told which they are by `--worker`."""
    processes = [
        subprocess.Popen([*command, "--worker", str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(workers)
    ]
    try:
        printed = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise SystemExit("a worker failed: see above")
    return [json.loads(out.splitlines()[-1]) for out in printed]


def together(workers: list[dict[str, Any]]) -> dict[str, Any]:
    """The slowest, and the largest, of the workers; bytes on disk are those of all."""
    return {name: (sum if name == "file_bytes" else max)(worker[name] for worker in workers) for name in workers[0]}


def _worker(args: argparse.Namespace) -> dict[str, Any]:
    (rows,) = args.rows
    if not args.workers:
        return _whole(rows, args)
    limit = timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=f"file://{args.store}", rank=args.worker, world_size=args.workers, timeout=limit)
    try:
        return _shared(rows, args, Topology(args.worker, args.workers))
    finally:
        dist.destroy_process_group()


def _shared(rows: int, args: argparse.Namespace, topology: Topology) -> dict[str, Any]:
    torch.manual_seed(1)
    embedding = ShardedEmbedding(rows, args.width)
    table = embedding.table
    table.place(topology)
    before = status("VmRSS")
    made_s, _ = timed(lambda: table.values)

    def step(ids: torch.Tensor) -> None:
        for part in ids.chunk(2):  # two micro-batches
            _loss(embedding(part)).backward()
        table.collect(topology.world)
        assert table.squared_norm() > 0
        table.step(LEARNING_RATE)

    seconds = list(_steps(step, rows, args, topology))
    peak = status("VmHWM") - before
    saved_s, entries = timed(lambda: save_tables({"table": table}, args.work))
    gathered: list[Any] = [None] * topology.world
    dist.all_gather_object(gathered, {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()})
    everything = {name: entry for of_one in gathered for name, entry in of_one.items()}
    read_s, _ = timed(lambda: table.take(read_tables(args.work, everything, topology)["table"]))
    return {
        "step_s": statistics.median(seconds),
        "longest_s": max(seconds),
        "peak_bytes": peak,
        "peak_with_files_bytes": status("VmHWM") - before,
        "made_s": made_s,
        "saved_s": saved_s,
        "read_s": read_s,
        "file_bytes": sum(entry["bytes"] for entry in entries.values()),
    }


def _whole(rows: int, args: argparse.Namespace) -> dict[str, Any]:
    before = status("VmRSS")
    embedding = torch.nn.Embedding(rows, args.width)
    optimizer = torch.optim.AdamW(embedding.parameters(), lr=LEARNING_RATE)

    def step(ids: torch.Tensor) -> None:
        for part in ids.chunk(2):
            _loss(embedding(part)).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = list(_steps(step, rows, args, Topology()))
    return {"step_s": statistics.median(seconds), "longest_s": max(seconds), "peak_bytes": status("VmHWM") - before}


def _steps(step: Callable[[torch.Tensor], None], rows: int, args: argparse.Namespace, topology: Topology) -> Iterator[float]:
    """Seconds of each step. Half of a step's rows are those of one worker alone; every row is looked up twice where it is."""
    drawn = random.Random(2)
    for number in range(WARM_UP + args.steps):
        ids = torch.tensor(drawn.sample(range(rows - 1), args.touched))
        alone = args.touched // 2
        own = torch.cat([ids[:alone][topology.rank :: topology.world], ids[alone:]]).repeat(2)
        barrier(topology)
        spent, _ = timed(lambda own=own: step(own))
        if number >= WARM_UP:
            yield spent


def _loss(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.sum(1).tanh().square().sum()


def status(name: str) -> int:
    """Bytes that the system tells of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that it took, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def text(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    header = (
        "table", "rows", "workers", "ms a step", "longest", "MiB needed", "peak, MiB", "with files",
        "s to make", "s to save", "s to read", "files, MiB",
    )  # fmt: skip
    scaled = {"step_s": 1e3, "longest_s": 1e3, "needed_bytes": 1 / MIB, "peak_bytes": 1 / MIB}
    scaled |= {"peak_with_files_bytes": 1 / MIB, "made_s": 1, "saved_s": 1, "read_s": 1, "file_bytes": 1 / MIB}
    rows = [
        [row["table"], row["rows"], row["workers"]]
        + [row[name] * factor if name in row else None for name, factor in scaled.items()]
        for row in report["tables"]
    ]
    settings = report["settings"]
    return (
        f"{machine_line(report['machine'])}.\n\nWidth {settings['width']}, {settings['touched']} rows touched a step, median of "
        f"{settings['steps']}; memory of each worker, above what it took before.\n\n{markdown(header, rows)}\n\n"
        f"A step in the largest table takes {report['ratio']:.2f} times that in the smallest."
    )


if __name__ == "__main__":
    sys.exit(main())
