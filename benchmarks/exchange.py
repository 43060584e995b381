"""Requests and bytes of preparation's shuffle, for logs of several sizes, asked block by block and with files merged.

A sample is prepared for real: its requests are counted at the storage, and must be those foretold; it also says how many bytes an
event takes. Larger logs are not written: their storage is simulated, files of that many bytes for evenly spread users, and the
reads are those that the tasks would make of them (`Pile.spans`).
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from benchmarks.raw import synthetic_log
from benchmarks.report import GIB, bytes_below, markdown
from ctrsink import logs, storage, strict_json
from ctrsink.config import load_run
from ctrsink.dataset.splits import PREFIXES, cut_shards
from ctrsink.prepare.assemble import Assembly
from ctrsink.prepare.build import prepare
from ctrsink.prepare.execute import Task, in_process
from ctrsink.prepare.pile import Merge, Pile, Shape, plan, slices

BLOCK_BYTES, SHARD_EVENTS = 32 * 2**20, 250_000  # the defaults of the configuration


def main() -> int:
    """Run the benchmark; returns the exit code, 1 where the sample's requests are not those foretold."""
    parser = argparse.ArgumentParser("python -m benchmarks.exchange", description=__doc__)
    sizes = [10**7, 130 * 10**6, 200 * 10**6, 10**9, 10**10]
    parser.add_argument("--events", nargs="+", type=int, default=sizes, help="sizes of the simulated logs")
    parser.add_argument("--sample", type=int, default=1_000_000, help="events of the log that is prepared")
    parser.add_argument("--work", metavar="DIR", help="where temporary files go (default: the system's place)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    args = parser.parse_args()
    logs.configure()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        report: dict[str, Any] = {"sample": sample(Path(folder), args.sample)}
    found = report["sample"]
    sizes = [(events, found["log_bytes"] / args.sample, found["file_bytes"] / args.sample) for events in args.events]
    report["simulated"] = [row for size in sizes for row in simulated(*size)]
    print(strict_json.dumps(report) if args.json else text(report))
    return 0 if found["counted"] == found["foretold"] else 1


def sample(folder: Path, events: int) -> dict[str, Any]:
    """Prepare a log of so many events in many blocks and shards; what its shuffle read, counted and foretold."""
    config = synthetic_log(folder, events)
    log_bytes = bytes_below(folder / "raw" / "events")
    spec = load_run(config, [f"prepare.block_bytes={log_bytes // 40}", f"prepare.shard_events={events // 200}"]).prepare
    assert spec is not None
    counted, foretold, file_bytes, read_range = Counter[str](), Counter[str](), [0], storage.read_range

    def counting(uri: str, start: int, end: int) -> bytes:
        if uri.endswith(".events"):
            counted["reads"] += 1
            counted["bytes"] += end - start
        return read_range(uri, start, end)

    def execute(task: Task, numbers: Sequence[int]) -> Iterator[int]:
        if isinstance(task, Merge):
            foretold.update(of_pile(task.source, even(task.shape.ranges)))
        elif isinstance(task, Assembly):
            foretold.update(of_pile(task.pile, task.ranges))
            file_bytes[0] = task.pile.bytes
        return in_process(task, numbers)

    with patch.object(storage, "read_range", counting):
        prepare(spec, str(folder / "data"), execute=execute)
    return {
        "events": events,
        "log_bytes": log_bytes,
        "file_bytes": file_bytes[0],
        "counted": dict(counted),
        "foretold": dict(foretold),
    }


def simulated(events: int, log_bytes: float, file_bytes: float) -> list[dict[str, Any]]:
    """The shuffle of a log without and with merging; bytes are of an event."""
    blocks = int(-(-events * log_bytes // BLOCK_BYTES))
    shards = cut_shards(np.full(PREFIXES, events / PREFIXES), SHARD_EVENTS)
    shape = Shape(blocks, 1, slices(len(shards)))
    steps = plan(shape, int(events * file_bytes), len(shards))
    rows = []
    for way in ((), steps) if steps else ((),):
        piles = [pile_of(each, events * file_bytes) for each in (shape, *way)]
        reads = [of_even(pile, even(after.ranges)) for pile, after in zip(piles, way, strict=False)]
        reads.append(of_even(piles[-1], shards))
        rows.append(
            {
                "events": events,
                "blocks": blocks,
                "shards": len(shards),
                "mergings": len(way),
                "reads": sum(read["reads"] for read in reads),
                "read_bytes": sum(read["bytes"] for read in reads),
                "other_requests": blocks + sum(3 * len(pile.ends) for pile in piles[1:]),
                "written_bytes": int(events * file_bytes) * len(piles),
                "shard_reads": reads[-1]["reads"] // len(shards),
            }
        )
    return rows


def pile_of(shape: Shape, total_bytes: float) -> Pile:
    """So many bytes, evenly spread."""
    files = shape.groups * shape.ranges
    ends = (np.arange(1, shape.slices + 1) * (total_bytes / files / shape.slices)).astype(np.int64)
    return Pile("", pa.schema([]), shape.groups, shape.ranges, shape.slices, (ends,) * files)


def even(ranges: int) -> list[tuple[int, int]]:
    """All prefixes, in so many ranges."""
    width = PREFIXES // ranges
    return [(first, first + width) for first in range(0, PREFIXES, width)]


def of_pile(pile: Pile, cuts: Sequence[tuple[int, int]]) -> Counter[str]:
    """Requests and bytes of reading every one of the ranges."""
    found: Counter[str] = Counter()
    for cut in cuts:
        for span in pile.spans(*cut):
            found["reads"] += 1
            found["bytes"] += span.end - span.start
    return found


def of_even(pile: Pile, cuts: Sequence[tuple[int, int]]) -> Counter[str]:
    """As of_pile, where all groups are alike."""
    one = of_pile(replace(pile, groups=1, ends=pile.ends[: pile.ranges]), cuts)
    return Counter({name: number * pile.groups for name, number in one.items()})


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    one = report["sample"]
    rows = [
        [
            *(row[name] for name in ("events", "blocks", "shards", "mergings")),
            row["reads"] + row["other_requests"],
            row["shard_reads"],
            row["read_bytes"] / GIB,
            row["written_bytes"] / GIB,
        ]
        for row in report["simulated"]
    ]
    header = ["events", "blocks", "shards", "mergings", "requests", "reads a shard", "GiB read", "GiB written"]
    return "\n\n".join(
        [
            f"A sample of {one['events']:,} events, prepared: {one['counted']['reads']:,} reads of {one['counted']['bytes']:,} "
            f"bytes; foretold: {one['foretold']['reads']:,} of {one['foretold']['bytes']:,}. "
            f"An event takes {one['log_bytes'] / one['events']:.1f} bytes in the log and "
            f"{one['file_bytes'] / one['events']:.1f} in the files that are shuffled.",
            markdown(header, rows),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
