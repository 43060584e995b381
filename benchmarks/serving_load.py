"""A service under load: at a stated rate for a while, then at three times that rate, and a plain FastAPI loop beside it.

The rate is a share of what the service does when eight clients ask back to back. Requests are those of users of the data set: a
history of `--history` behaviours and `--candidates` items drawn at random; users come again, by Zipf's law. They arrive by
a Poisson process, and times are counted from when a request was due, so waiting for a late client is not hidden.
"""

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil

from benchmarks.http_load import Outcome, due_times, send_at, send_back_to_back
from benchmarks.report import machine, machine_line, markdown
from ctrsink import strict_json
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.serve import request_of

MIB = 2**20


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    try:
        report = run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.serving_load", description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="exported model")
    parser.add_argument("--data", required=True, metavar="DIR", help="its data set")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the load (default: %(default)s)")
    parser.add_argument("--overload", type=float, default=60.0, help="seconds at three times the rate (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.6, help="of what back-to-back clients reach (default: %(default)s)")
    parser.add_argument("--calibrate", type=float, default=20.0, help="seconds for that, and for the plain loop")
    parser.add_argument("--history", type=int, default=50, help="behaviours (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--users", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the service")
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return all figures."""
    found = machine()
    bodies = requests(args)
    order = np.random.default_rng(0).zipf(1.3, 10**6) % len(bodies)
    body: Callable[[int], bytes] = lambda number: bodies[order[number % len(order)]]  # noqa: E731
    ways: dict[str, dict[str, Any]] = {}
    with started(["benchmarks.serving_plain", args.model]) as (_, port):
        asyncio.run(send_back_to_back(port, 1, args.calibrate / 4, body))
        ways["plain loop, 8 clients back to back"] = figures(asyncio.run(send_back_to_back(port, 8, args.calibrate, body)))
    command = ["ctrsink", "serve", "--plain", "--model", args.model, *args.overrides]
    with started(command) as (process, port):
        asyncio.run(send_back_to_back(port, 8, args.calibrate / 4, body))
        calm = asyncio.run(send_back_to_back(port, 8, args.calibrate, body))
        ways["service, 8 clients back to back"] = figures(calm)
        rate = args.share * calm.count(200) / calm.took
        for name, times, seconds in (("service, load", 1, args.seconds), ("service, overload", 3, args.overload)):
            before = process.memory_info().rss
            outcome = asyncio.run(send_at(port, due_times(times * rate, seconds), body))
            grew = (process.memory_info().rss - before) / MIB
            ways[f"{name} of {times * rate:.1f}/s for {outcome.took:.0f} s"] = figures(outcome) | {"grew_mib": grew}
    names = ("model", "history", "candidates", "users", "share", "overrides")
    return {"machine": found, "settings": {name: getattr(args, name) for name in names}, "ways": ways}


def requests(args: argparse.Namespace) -> list[bytes]:
    """One for each of so many users with enough behaviours."""
    dataset, chance = Dataset(args.data), np.random.default_rng(0)
    found: list[bytes] = []
    for user in range(len(dataset.index["shard"])):
        try:
            items = chance.integers(0, dataset.manifest.item_count, args.candidates).tolist()
            tree = request_of(dataset, user, args.history, items)
        except InputError:  # fewer events
            continue
        found.append(json.dumps(tree).encode())
        if len(found) == args.users:
            return found
    raise InputError(f"{args.data} has {len(found)} users of {args.history} behaviours and more: lower --users or --history")


@contextmanager
def started(command: list[str]) -> Iterator[tuple[psutil.Process, int]]:
    """A process that serves on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", *command, "--port", str(port)])
    try:
        while not _answers(port):
            if process.poll() is not None:
                raise InputError(f"{command[0]} ended with {process.returncode} before it was ready")
            time.sleep(0.5)
        yield psutil.Process(process.pid), port
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    """Whether it takes requests: one that is none gets another answer than 503."""
    try:
        return asyncio.run(send_at(port, due_times(1, 1), lambda _: b"{}")).seconds.keys().isdisjoint({0, 503})
    except OSError:
        return False


def figures(outcome: Outcome) -> dict[str, Any]:
    """Of one way."""
    answered = outcome.count(200)
    return {
        "requests": sum(map(len, outcome.seconds.values())),
        "answered_s": answered / outcome.took,
        "p50": outcome.quantile(0.5),
        "p99": outcome.quantile(0.99),
        "refused": outcome.count(503),
        "failed": sum(len(of) for status, of in outcome.seconds.items() if status not in (200, 503)),
    }


def text(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    header = ["way", "requests", "answered/s", "p50 s", "p99 s", "503", "failed", "memory grew by MiB"]
    rows = [[name, *of.values(), *([None] if "grew_mib" not in of else [])] for name, of in report["ways"].items()]
    return "\n\n".join([machine_line(report["machine"]), settings, markdown(header, rows)])


if __name__ == "__main__":
    sys.exit(main())
