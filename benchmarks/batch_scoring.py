"""Memory of `ctrsink score`: a file of requests and one that is many times as large, at once and by blocks.

Each is scored by a process of its own with one thread; told is the most memory that it had resident, and how long it took. A tiny
model with random weights, a short history, and in each request a text that the model does not read: what is measured is the file.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import machine, machine_line, markdown
from benchmarks.scoring import random_model, request_tree
from ctrsink import strict_json
from ctrsink.prepare.tokenize import fingerprint

FORMS = ("at once", "jsonl", "jsonl.gz", "parquet")


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.batch_scoring", description=__doc__)
    parser.add_argument("--requests", type=int, default=500, help="of the smaller file (default: %(default)s)")
    parser.add_argument("--times", type=int, default=20, help="as many in the larger one (default: %(default)s)")
    parser.add_argument("--padding", type=int, default=10_000, help="bytes of each that are not read (default: %(default)s)")
    parser.add_argument("--block-bytes", type=int, default=1 << 20, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = {"machine": machine(), "settings": vars(args), "scored": list(measured(args, Path(folder)))}
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def measured(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Memory and time of both sizes in each form."""
    write_model(folder / "model")
    for form in FORMS:
        found: dict[str, Any] = {"form": form}
        for name, count in (("small", args.requests), ("large", args.requests * args.times)):
            path = folder / f"{name}.{'jsonl' if form == 'at once' else form}"
            write_requests(path, count, args.padding)
            to = f"{folder}/{name}-{form}{'.out' if form == 'at once' else '/'}"
            verb = ["score", "--model", str(folder / "model"), "--input", str(path), "--output", to]
            blocks = [] if form == "at once" else ["--block-bytes", str(args.block_bytes)]
            found[f"{name}_bytes"] = path.stat().st_size
            found[f"{name}_mib"], found[f"{name}_s"] = run([sys.executable, "-m", "ctrsink", *verb, *blocks, "--json"])
            path.unlink()
        yield found


def run(command: list[str]) -> tuple[float, float]:
    """The most memory that a process had resident, MiB, and its seconds."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}")
    return used.ru_maxrss / 1024, time.perf_counter() - began


def write_model(folder: Path) -> None:
    """A tiny model, as `ctrsink export` would write it."""
    loaded = random_model("tiny", 3)
    loaded.model.config.tokenizer_fingerprint = fingerprint(loaded.tokenizer)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def write_requests(path: Path, count: int, padding: int) -> None:
    """So many requests, in a file of the kind that its name says."""
    chance = np.random.default_rng(0)
    words = [f"word{number} " for number in range(1000)]

    def requests() -> Iterator[dict[str, Any]]:
        for number in range(count):
            tree = request_tree(chance, 3, 2)
            tree["candidates"][0]["note"] = "".join(chance.choice(words, padding // 8))
            yield tree | {"id": number}

    if path.suffix == ".parquet":
        source = requests()
        schema = pa.Table.from_pylist(list(islice(requests(), 1))).schema
        with pq.ParquetWriter(path, schema) as writer:
            # One row group, as large as the file: the worst that a file can be.
            writer.write_table(pa.Table.from_pylist(list(source), schema), row_group_size=count)
        return
    with gzip.open(path, "wt", 1) if path.suffix == ".gz" else path.open("w") as file:
        for tree in requests():
            file.write(json.dumps(tree) + "\n")


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    header = ["", "MB, smaller file", "MB, larger", "MiB resident, smaller", "MiB, larger", "ratio", "s, smaller", "s, larger"]
    rows = [
        [
            row["form"],
            row["small_bytes"] / 1e6,
            row["large_bytes"] / 1e6,
            row["small_mib"],
            row["large_mib"],
            row["large_mib"] / row["small_mib"],
            row["small_s"],
            row["large_s"],
        ]
        for row in report["scored"]
    ]
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items() if name != "json")
    return f"{machine_line(report['machine'])}\n\n{settings}\n\n{markdown(header, rows)}"


if __name__ == "__main__":
    sys.exit(main())
