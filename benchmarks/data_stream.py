"""Impressions per second of batches ready for the model, time to the first one, and memory: ours beside other loaders.

All read the same impressions on the same machine in one run, each measurement in a process of its own, round by round.
"""

import argparse
import dataclasses
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.contestants import CONTESTANTS, OURS, SHUFFLE_SHARDS, Task, source
from benchmarks.impressions import read_samples, write_mds, write_parquet
from benchmarks.optional import INSTALL, installed
from benchmarks.raw import prepared_data
from benchmarks.report import bytes_below, machine
from benchmarks.stream_figures import first_figures, memory_figures, speed_figures, text
from benchmarks.stream_jobs import Jobs
from ctrsink import logs, storage, strict_json
from ctrsink.dataset.manifest import read_manifest
from ctrsink.errors import InputError


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    logs.configure()
    try:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            report = run(args, Path(folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.data_stream", description=__doc__)
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--events", type=int, default=200_000, help="size of a synthetic log (default: %(default)s)")
    data.add_argument("--config", metavar="FILE", help="a run's configuration whose section prepare says what the log is")
    data.add_argument("--data", metavar="URI", help="a data set that is prepared already")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="loader processes (default: 0 2)")
    parser.add_argument("--sinks", choices=["off", "on"], default="off")
    parser.add_argument("--history", type=int, default=50, help="behaviours before a target, at most")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="processes per figure; the median is told")
    parser.add_argument("--warmup", type=int, default=20, help="batches before the clock starts")
    parser.add_argument("--seconds", type=float, default=10.0, help="most that one timing takes")
    parser.add_argument("--resume-at", type=float, default=0.9, metavar="SHARE", help="of an epoch (default: 0.9)")
    parser.add_argument("--memory-batches", nargs=2, type=int, default=[100, 10_000], metavar=("FIRST", "LAST"))
    parser.add_argument("--s3", metavar="URI", help="put all forms below this folder while it runs, and read them there")
    parser.add_argument("--work", metavar="DIR", help="where temporary files go (default: the system's place)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for --config")
    return parser.parse_args()


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the forms below `folder`, measure everybody, and return all figures.

    Raises:
        InputError: the log cannot be prepared or is too short.
    """
    found = machine()
    needs = {name: package for name in args.contestants if (package := CONTESTANTS[name][1])}
    absent = {name: INSTALL[package] for name, package in needs.items() if not installed(package)}
    names = [name for name in args.contestants if name not in absent]
    task = Task(
        contestant=OURS,
        workers=0,
        batch_size=args.batch_size,
        history=args.history,
        signals=("previous_gap",) if args.sinks == "on" else (),
        total=0,
        data=args.data or prepared_data(folder, args.events, args.config, args.overrides),
        mds=str(folder / "mds"),
        parquet=str(folder / "parquet"),
        scratch=str(folder),
    )
    task = dataclasses.replace(task, total=sum(source(task).per_shard))
    if task.total < (args.warmup + 3) * args.batch_size:
        raise InputError(f"the log has {task.total} impressions to train on, too few beside {args.warmup} warm-up batches")
    sizes = write_forms(task, {needs.get(name) for name in names})
    # A folder of its own: what else lies in the bucket is not ours to delete.
    place = storage.join(args.s3, f"benchmark-{secrets.token_hex(8)}") if args.s3 else None
    try:
        task = to_s3(task, place) if place else task
        figures = measure(args, names, Jobs(task, args.repeats))
    finally:
        if place:
            storage.delete(place)
    return {
        "machine": found,
        "settings": {
            "impressions": task.total,
            "place": "from S3" if args.s3 else "from local files",
            "shuffled": {
                OURS: f"in blocks of {SHUFFLE_SHARDS} shards",
                "datasets": f"in a buffer of {task.shuffle_buffer:,}",
                "mosaicml-streaming": "as a whole",
            },
        }
        | {name: getattr(args, name) for name in ("batch_size", "history", "sinks", "repeats", "warmup", "seconds", "resume_at")},
        "not_installed": absent,
        "bytes": sizes,
        **figures,
    }


def write_forms(task: Task, packages: set[str | None]) -> dict[str, int]:
    """Write the impressions as the packages want them; returns the bytes of each form."""
    manifest = read_manifest(task.data)
    shards = [file for shard in manifest.shards for file in (shard.events_file, shard.tokens_file)]
    sizes = {OURS: sum(file.bytes for file in (*manifest.common_files, *shards))}
    if "datasets" in packages:
        write_parquet(Path(task.parquet), read_samples(source(task)), task.total)
        sizes["datasets"] = bytes_below(task.parquet)
    if "mosaicml-streaming" in packages:
        write_mds(Path(task.mds), read_samples(source(task)))
        sizes["mosaicml-streaming"] = bytes_below(task.mds)
    return sizes


def to_s3(task: Task, uri: str) -> Task:
    """Copy the forms that are local below `uri`; returns the task that reads them there."""
    local = {name: folder for name in ("data", "mds", "parquet") if Path(folder := getattr(task, name)).is_dir()}
    for name, folder in local.items():
        storage.upload_dir(folder, storage.join(uri, name))
    return dataclasses.replace(task, **{name: storage.join(uri, name) for name in local})


def measure(args: argparse.Namespace, names: list[str], jobs: Jobs) -> dict[str, Any]:
    """Contents first, then times, then memory."""
    checked = {name: jobs.once((name, 0), "check", seed=1, count=2)["impressions"] for name in names}
    everybody = [(name, workers) for name in names for workers in args.workers]
    figures = speed_figures(jobs.rounds(everybody, "speed", warmup=args.warmup, seconds=args.seconds))
    alone = [(name, 0) for name in names]
    jobs.rounds([who for who in alone if CONTESTANTS[who[0]][1] == "datasets"], "state", share=args.resume_at)
    figures |= first_figures(jobs.rounds(alone, "first", share=args.resume_at))
    if OURS in names:
        figures |= memory_figures(jobs.once((OURS, 0), "memory", seed=0, marks=args.memory_batches))
    return {"checked_impressions": checked} | figures


if __name__ == "__main__":
    sys.exit(main())
