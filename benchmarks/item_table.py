"""What the process that starts a preparation holds of a large item table: while tasks run, and at its highest.

A made-up item table and a log of a few thousand events are prepared in one process, which here runs the tasks too. Counted is
memory that is no file's (`RssAnon`), less what there was before.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.catalogue import MIB, held
from benchmarks.report import machine, machine_line, markdown
from ctrsink import logs, strict_json

EVENTS = 5000


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.item_table", description=__doc__)
    parser.add_argument("--items", nargs="+", type=int, default=[10_000_000], help="of the table (default: 10 million)")
    parser.add_argument("--work", metavar="DIR", help="where temporary files go (default: the system's place)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    logs.configure()
    rows = []
    for items in args.items:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            rows.append(measure(Path(folder), items))
    report = {"machine": machine(), "events": EVENTS, "rows": rows}
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def measure(work: Path, items: int) -> dict[str, Any]:
    """Bytes and seconds of a preparation."""
    from ctrsink.config import PrepareSpec
    from ctrsink.prepare.build import prepare

    file = written(work, items)
    columns = {"user": "user", "item": "item", "timestamp": "timestamp", "label": "click"}
    tree = {
        "source": {"kind": "table", "path": str(work / "events.csv"), "items": str(work / "items.csv"), "columns": columns},
        "text": {"item": "{title}, {genre}"},
        "tokenizer": {"train_vocabulary": 1024},
    }
    began, processor, before = time.perf_counter(), time.process_time(), held()
    while_tasks_run: list[int] = []

    def noted(task: Any, numbers: Sequence[int]) -> Iterator[int]:
        if numbers:
            while_tasks_run.append(held() - before)
        return map(task, numbers)

    ended, most = threading.Event(), [before]
    watch = threading.Thread(target=_watched, args=(ended, most), daemon=True)
    watch.start()
    prepare(PrepareSpec.model_validate(tree), str(work / "data"), execute=noted)
    ended.set()
    watch.join()
    return {
        "items": items,
        "file": file,
        "held": max(while_tasks_run),
        "peak": most[0] - before,
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - processor,
    }


def written(work: Path, items: int) -> int:
    """Write the log and the item table; returns the bytes of the table."""
    chance = np.random.default_rng(0)
    with (work / "items.csv").open("w") as file:
        file.write("item,title,genre\n")
        for number in range(items):
            file.write(f"item-{number},A thing of kind {number % 9973} from place {number % 997},genre {number % 31}\n")
    rows = zip(chance.integers(0, 100, EVENTS), chance.integers(0, items, EVENTS), chance.integers(0, 2, EVENTS), strict=True)
    lines = [f"user-{user},item-{item},{1_600_000_000 + 60 * n},{click}" for n, (user, item, click) in enumerate(rows)]
    (work / "events.csv").write_text("\n".join(["user,item,timestamp,click", *lines, ""]))
    return (work / "items.csv").stat().st_size


def _watched(ended: threading.Event, most: list[int]) -> None:
    while not ended.wait(0.05):
        most[0] = max(most[0], held())


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    header = ("items", "file, MiB", "held while tasks run, MiB", "peak, MiB", "s", "processor s")
    rows = [
        (f"{r['items']:,}", *(f"{r[k] / MIB:,.0f}" for k in ("file", "held", "peak")), r["seconds"], r["processor_seconds"])
        for r in report["rows"]
    ]
    return f"{machine_line(report['machine'])}.\n\n{markdown(header, rows)}"


if __name__ == "__main__":
    sys.exit(main())
