"""What a task of preparation takes to find its shard's items in a large catalogue, and their tokens, and what it holds of it.

Three ways, each in a process of its own, for shards one after another: the mapped lookup as it is; a hash table of all ids that
each shard builds anew; and the same with ids and tokens read into memory. Tokens are made up.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.report import machine, machine_line, markdown
from ctrsink import logs, storage, strict_json
from ctrsink.dataset.arrow import from_ipc, pc
from ctrsink.prepare.lookup import Lookup
from ctrsink.prepare.results import column_of, read_named, write_named

MIB = 2**20
WAYS = ("mapped lookup", "hash table", "hash table, in memory")
SHARDS = 3
TOKENS = 16


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.catalogue", description=__doc__)
    parser.add_argument("--items", type=int, default=10_000_000, help="of the catalogue (default: 10 million)")
    parser.add_argument("--events", type=int, default=250_000, help="of a shard (default: 250,000)")
    parser.add_argument("--work", metavar="DIR", help="where temporary files go (default: the system's place)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--task", nargs=3, metavar=("WAY", "IDS", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        way, ids, tokens = args.task
        return task(way, ids, tokens, args.items, args.events)
    logs.configure()
    report: dict[str, Any] = {"machine": machine(), "items": args.items, "events": args.events}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        began = time.perf_counter()
        ids = write_named(folder, "ids", Lookup.of(names(np.arange(args.items))).table())
        report["lookup_seconds"] = time.perf_counter() - began
        offsets = pa.array(np.arange(args.items + 1, dtype=np.int32) * TOKENS)
        lists = pa.ListArray.from_arrays(offsets, pa.array(np.arange(TOKENS * args.items, dtype=np.int32)))
        tokens = write_named(folder, "tokens", pa.table({"tokens": lists}))
        del lists
        report["bytes"] = sum(path.stat().st_size for path in Path(folder).iterdir())
        sizes = ["--items", str(args.items), "--events", str(args.events)]
        command = [sys.executable, "-m", "benchmarks.catalogue", *sizes, "--task"]
        found = [subprocess.run([*command, way, ids, tokens], capture_output=True, text=True, check=True) for way in WAYS]
    report["ways"] = [{"way": way} | json.loads(done.stdout) for way, done in zip(WAYS, found, strict=True)]
    print(strict_json.dumps(report) if args.json else text(report))
    return 0 if len({way["sum"] for way in report["ways"]}) == 1 else 1


def names(numbers: np.ndarray) -> pa.Array:
    """Ids of items."""
    return pc.binary_join_element_wise("item", pc.cast(pa.array(numbers), pa.string()), "-")


def task(way: str, ids: str, tokens: str, items: int, events: int) -> int:
    """Find the items of some shards, Zipf's law among them, and take their tokens; prints what it took."""
    before, seconds, total = held(), [], 0
    rng = np.random.default_rng(0)
    for _ in range(SHARDS):
        asked = names(np.minimum(np.exp(rng.random(events) * np.log(items)).astype(np.int64), items - 1))
        began, processor = time.perf_counter(), time.process_time()
        if way == "mapped lookup":
            rows = pa.array(Lookup.from_table(read_named(ids)).find(asked))
        else:
            table = read_named(ids) if way == "hash table" else whole(ids)
            rows = pc.index_in(asked, table.column("item").chunk(0))
        column = column_of(tokens, "tokens") if way != "hash table, in memory" else whole(tokens).column("tokens").chunk(0)
        taken = column.take(pc.unique(rows))
        seconds.append((time.perf_counter() - began, time.process_time() - processor))
        total += int(pc.sum(rows).as_py()) + int(pc.sum(taken.flatten()).as_py())
    wall, cpu = np.median(np.array(seconds), axis=0).tolist()
    print(strict_json.dumps({"seconds": wall, "processor_seconds": cpu, "held_bytes": peak() - before, "sum": total}))
    return 0


KEPT: dict[str, pa.Table] = {}


def whole(path: str) -> pa.Table:
    """The table in memory, read once."""
    if path not in KEPT:
        KEPT[path] = from_ipc(storage.read_bytes(path))
    return KEPT[path]


def held() -> int:
    """Bytes of this process that are no file's."""
    return _status("RssAnon")


def peak() -> int:
    """What it holds now, and what Arrow's pool held beyond that at its highest."""
    pool = pa.default_memory_pool()
    return held() + max(0, (pool.max_memory() or 0) - pool.bytes_allocated())


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    rows = [[way["way"], way["seconds"], way["processor_seconds"], way["held_bytes"] / MIB] for way in report["ways"]]
    return "\n\n".join(
        [
            f"Machine: {machine_line(report['machine'])}",
            f"{report['items']:,} items, {report['bytes'] / MIB:,.0f} MiB of ids and tokens; the lookup was made in "
            f"{report['lookup_seconds']:.1f} s. Shards of {report['events']:,} events, the median of {SHARDS}.",
            markdown(["way", "s a shard", "processor s", "held MiB"], rows),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
