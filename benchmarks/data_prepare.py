"""Speed and memory of `ctrsink data prepare` for logs of several sizes, and that its bytes do not depend on how it ran.

Memory is that of all processes together, Ray's too, sampled while it runs; a page that several share is counted once.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import Peak
from benchmarks.raw import synthetic_log
from benchmarks.report import GIB, bytes_below, machine, machine_line, markdown
from ctrsink import logs, storage, strict_json
from ctrsink.dataset.manifest import MANIFEST_NAME
from ctrsink.errors import InputError

MIB = 2**20


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser("python -m benchmarks.data_prepare", description=__doc__)
    sizes = [1_000_000, 5_000_000, 10_000_000, 50_000_000]
    parser.add_argument("--events", nargs="+", type=int, default=sizes, help="sizes of the logs (default: 1, 5, 10, 50 million)")
    parser.add_argument("--workers", type=int, default=2, help="prepare.workers: 1 takes one process and no Ray (default: 2)")
    parser.add_argument("--period", type=float, default=0.5, help="seconds between two looks at the memory")
    parser.add_argument("--same-events", type=int, default=1_000_000, help="size of the log that is prepared in several ways")
    parser.add_argument("--work", metavar="DIR", help="where temporary files go (default: the system's place)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    args = parser.parse_args()
    logs.configure()
    try:
        report = run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(strict_json.dumps(report) if args.json else text(report))
    return 0 if report["same"]["identical"] else 1


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every size, then prepare one log in several ways; each log is deleted before the next one is made."""
    report: dict[str, Any] = {"machine": machine(), "workers": args.workers, "period_s": args.period, "sizes": []}
    for events in args.events:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            config = synthetic_log(Path(folder), events)
            report["sizes"].append({"events": events} | measure(config, Path(folder), args.workers, args.period, 32 * MIB))
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        config = synthetic_log(Path(folder), args.same_events)
        log_bytes = bytes_below(Path(folder) / "raw")
        # In process, by two and by three tasks of Ray Data at a time; and blocks of sizes of which other numbers make up the log.
        ways = [(1, 32 * MIB), (2, max(1, log_bytes // 3)), (3, max(1, log_bytes // 7))]
        found = [
            {"workers": workers, "block_bytes": block} | measure(config, Path(folder), workers, args.period, block)
            for workers, block in ways
        ]
    report["same"] = {
        "events": args.same_events,
        "ways": found,
        "identical": len({way["manifest_sha256"] for way in found}) == 1,
    }
    return report


def measure(config: Path, folder: Path, workers: int, period: float, block_bytes: int) -> dict[str, Any]:
    """Prepare the log of `config` in a process of its own and watch it.

    Raises:
        SystemExit: the preparation failed; it has said why.
    """
    overrides = [f"prepare.workers={workers}", f"prepare.block_bytes={block_bytes}"]
    command = [sys.executable, "-m", "ctrsink", "data", "prepare", "--config", str(config), "--overwrite", *overrides]
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"})
    peak = Peak(child.pid, period)
    try:
        code = child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    highest = peak.stop()
    seconds = time.perf_counter() - began
    if code:
        raise SystemExit(f"ctrsink data prepare ended with exit code {code}, see above")
    manifest = storage.read_bytes(storage.join(str(folder / "data"), MANIFEST_NAME))
    return {
        "seconds": seconds,
        "peak_bytes": highest,
        "log_bytes": bytes_below(folder / "raw"),
        "data_bytes": bytes_below(folder / "data"),
        "manifest_sha256": storage.sha256(manifest),
    }


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    rows = [
        [
            size["events"],
            size["seconds"],
            size["events"] / size["seconds"],
            size["peak_bytes"] / GIB,
            size["log_bytes"] / GIB,
            size["data_bytes"] / GIB,
        ]
        for size in report["sizes"]
    ]
    same = report["same"]
    ways = [
        [f"{way['workers']} workers", way["block_bytes"], way["seconds"], way["peak_bytes"] / GIB, way["manifest_sha256"][:16]]
        for way in same["ways"]
    ]
    return "\n\n".join(
        [
            f"Machine: {machine_line(report['machine'])}",
            f"Preparation with {report['workers']} workers, from the start of the command to its end; memory of all processes, "
            f"looked at every {report['period_s']:g} s.",
            markdown(["events", "seconds", "events/s", "peak GiB", "log GiB", "data GiB"], rows),
            f"The same {same['events']:,} events prepared in other ways (1 worker: in one process, without Ray): "
            + ("identical bytes." if same["identical"] else "DIFFERENT BYTES."),
            markdown(["way", "block bytes", "seconds", "peak GiB", "sha256 of the manifest"], ways),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
