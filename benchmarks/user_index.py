"""What the processes of a host hold of the users of a large data set, with and without the mapped index.

A small log is prepared, and its manifest made to speak of many shards of so many users, whose index is written; there is no
model, and no shard is read. Each process opens the data set as training does, and asks for lengths of sequences all over it.
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
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.memory import resident
from benchmarks.raw import prepared_data
from benchmarks.report import machine, machine_line, markdown
from ctrsink import logs, storage, strict_json
from ctrsink.dataset.cache import Cache
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.manifest import INDEX_SCHEMA, MANIFEST_NAME, FileEntry, read_manifest
from ctrsink.dataset.reader import Dataset
from ctrsink.families.registry import source_of

MIB = 2**20
PER_SHARD = 20_000


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.user_index", description=__doc__)
    parser.add_argument("--users", type=int, default=10_000_000, help=f"a multiple of {PER_SHARD} (default: 10 million)")
    parser.add_argument("--processes", type=int, default=4, help="of the host (default: 4)")
    parser.add_argument("--work", metavar="DIR", help="where temporary files go (default: the system's place)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--open", nargs=2, metavar=("DATA", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        return opened(*args.open)
    logs.configure()
    report: dict[str, Any] = {"machine": machine(), "users": args.users, "ways": []}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        uri = many_users(Path(folder), args.users)
        for way, cache in (("mapped", str(Path(folder) / "cache")), ("in memory", "")):
            report["ways"].append({"way": way} | measured(uri, cache, args.processes))
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def many_users(folder: Path, users: int) -> str:
    """A data set whose manifest and index have so many users; returns its folder."""
    uri = prepared_data(folder, 20_000, None, [])
    manifest, rng = read_manifest(uri), np.random.default_rng(0)
    counts = rng.integers(1, 12, (6, users), np.int32)
    numbers = np.arange(users, dtype=np.int32)
    columns = [numbers // PER_SHARD, numbers % PER_SHARD, np.zeros(users, np.int32), *counts]
    table = pa.Table.from_arrays([pa.array(column) for column in columns], schema=INDEX_SCHEMA)
    path = Path(uri) / manifest.index.path
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    entry = FileEntry(path=manifest.index.path, bytes=path.stat().st_size, sha256=storage.sha256(path.read_bytes()))
    shard = manifest.shards[0].model_copy(update={"users": PER_SHARD})
    found = manifest.model_copy(update={"index": entry, "shards": (shard,) * (users // PER_SHARD)})
    (Path(uri) / MANIFEST_NAME).write_text(found.model_dump_json())
    return uri


def opened(uri: str, cache: str) -> int:
    """One process: opens the data set, tells the seconds, and waits until it may end."""
    before, began = psutil.Process().memory_full_info().uss, time.perf_counter()
    dataset = Dataset(uri, cache=Cache(cache, 2**40) if cache else None)
    source = source_of(dataset, "train", Layout("decoder", "per_target", history=50, targets=1))
    seconds = time.perf_counter() - began
    ids = np.random.default_rng(0).integers(0, sum(source.per_shard), 2_000)
    began = time.perf_counter()
    total = int(source.lengths(ids).sum())
    asked = time.perf_counter() - began
    own = psutil.Process().memory_full_info().uss - before
    print(strict_json.dumps({"seconds": seconds, "asked_seconds": asked, "own_bytes": own, "total": total}), flush=True)
    sys.stdin.read()
    return 0


def measured(uri: str, cache: str, processes: int) -> dict[str, Any]:
    """Open the data set in one process, which makes what is to be made, and then in all others at once."""
    command = [sys.executable, "-m", "benchmarks.user_index", "--open", uri, cache]
    children: list[subprocess.Popen[str]] = []
    found: list[dict[str, Any]] = []
    try:
        for group in (1, processes - 1):
            started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(group)]
            children += started
            for child in started:
                assert child.stdout is not None
                found.append(json.loads(child.stdout.readline()))
        together = sum(resident(child.pid) for child in children)
        own = [psutil.Process(child.pid).memory_full_info().uss for child in children]
    finally:
        for child in children:
            child.communicate()
    assert len({one["total"] for one in found}) == 1
    return {
        "first_seconds": found[0]["seconds"],
        "others_seconds": float(np.mean([one["seconds"] for one in found[1:]])),
        "asked_seconds": float(np.mean([one["asked_seconds"] for one in found])),
        "grew_bytes": float(np.mean([one["own_bytes"] for one in found[1:]])),
        "own_bytes": float(np.mean(own)),
        "together_bytes": together,
    }


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    rows = [
        [
            way["way"],
            way["first_seconds"],
            way["others_seconds"],
            way["asked_seconds"],
            way["grew_bytes"] / MIB,
            way["own_bytes"] / MIB,
            way["together_bytes"] / MIB,
        ]
        for way in report["ways"]
    ]
    header = ["index", "s to open, first", "others", "s for 2,000 lengths", "grew by MiB", "own MiB", "all processes MiB"]
    return f"Machine: {machine_line(report['machine'])}\n\n{report['users']:,} users.\n\n{markdown(header, rows)}"


if __name__ == "__main__":
    sys.exit(main())
