"""What a checkpoint costs: seconds that training is blocked, seconds until it is safe, bytes, seconds to go on from it.

A decoder of SmolLM2-135M's shape with random weights, one process with DeepSpeed (ZeRO 2), on CPU; local disk, and a SeaweedFS
server on loopback where its binary is installed. The trained parameters grow from LoRA of rank 8 to the whole backbone.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.report import machine, machine_line, markdown
from benchmarks.shapes import SHAPES, shape_of
from ctrsink import logs, storage, strict_json
from ctrsink.config import RunSpec, parse_run
from ctrsink.errors import InputError
from ctrsink.runtime.process import prepare_process
from ctrsink.train.checkpoint.writer import CheckpointWriter

VOCABULARY = 49_152
BUCKET = "checkpoints"
TRAINED: dict[str, dict[str, Any]] = {
    "LoRA, rank 8": {"group": "lora", "lora": {"rank": 8}},
    "LoRA, rank 64": {"group": "lora", "lora": {"rank": 64}},
    "whole backbone": {"group": "backbone", "lora": None},
}
T = TypeVar("T")


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
    parser = argparse.ArgumentParser("python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2")
    parser.add_argument("--trained", nargs="+", choices=list(TRAINED), default=list(TRAINED))
    parser.add_argument("--repeats", type=int, default=3, help="checkpoints of each; the median is told")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--work", metavar="DIR", help="where the local checkpoints are written and removed (default: $TMPDIR)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args()


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure everything below `folder` and on S3; returns all figures."""
    found = machine()
    prepare_process("cpu", args.threads)
    import torch.distributed as dist

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows: list[dict[str, Any]] = []
    with _s3_server() as s3:
        places = {"disk": str(folder)} | ({"S3": s3} if s3 else {})
        for trained in args.trained:
            rows += measure(spec_of(args.shape, trained), trained, places, args.repeats)
    dist.destroy_process_group()
    settings = {"shape": args.shape, "repeats": args.repeats, "threads": args.threads, "s3": s3 is not None}
    return {"machine": found, "settings": settings, "checkpoints": rows}


def spec_of(shape: str, trained: str) -> RunSpec:
    """A run of one stage that trains sinks, bias in all layers, head, and what `trained` names."""
    what = TRAINED[trained]
    groups = ["sink", "bias", "head", what["group"]]
    model = {"backbone": {"config": shape_of(shape)}, "sinks": {}, "bias": {"layers": 1.0}, "lora": what["lora"]}
    stage = {"name": "all", "trainable": groups, "lr": dict.fromkeys(groups, 0.001), "steps": 1}
    return parse_run({"run_dir": "unused", "data": {"uri": "unused"}, "model": model, "stages": [stage]}, "benchmark")


def measure(spec: RunSpec, trained: str, places: dict[str, str], repeats: int) -> list[dict[str, Any]]:
    """A row per place; the first save of each is the warm-up."""
    from ctrsink.config import KeepSpec
    from ctrsink.config.model import DecoderSpec
    from ctrsink.dist import Topology
    from ctrsink.families.decoder.build import build_model
    from ctrsink.families.parameters import load_parameters
    from ctrsink.train.checkpoint.checkpoint import Checkpoint, find_checkpoint, folder_of
    from ctrsink.train.engine import Engine, EngineState

    def engine_of(checkpoint: Checkpoint | None) -> Engine:
        assert isinstance(spec.model, DecoderSpec)
        model = build_model(spec.model, VOCABULARY, 0)
        state = None
        if checkpoint is not None:
            load_parameters(model, checkpoint.parameters)
            state = EngineState({}, checkpoint.moments, checkpoint.steps)
        return Engine(model.train(), spec, spec.stages[0], Topology(), state)

    engine = engine_of(None)
    count = sum(p.numel() for p in engine.named.values())
    rows = []
    for place, uri in places.items():
        run_dir = storage.join(uri, trained.replace(" ", "-"))
        writer = CheckpointWriter(run_dir, KeepSpec(last=1))
        blocked, total, stalled = [], [], []
        for step in range(1, repeats + 2):
            start = time.perf_counter()
            state = engine.state()
            writer.save(Checkpoint(step, step, state.parameters, state.moments, state.steps, "0" * 64))
            blocked.append(time.perf_counter() - start)
            stalled.append(_longest_pause(writer))
            writer.wait()
            total.append(time.perf_counter() - start)
            del state
        folder = folder_of(run_dir, repeats + 1)
        reading, checkpoint = _timed(lambda run_dir=run_dir: find_checkpoint(run_dir))
        building, _ = _timed(lambda checkpoint=checkpoint: engine_of(checkpoint).destroy())
        rows.append(
            {
                "trained": trained,
                "parameters": count,
                "place": place,
                "blocked_s": statistics.median(blocked[1:]),
                "longest_pause_s": max(stalled[1:]),
                "total_s": statistics.median(total[1:]),
                "bytes": sum(one.bytes for one in storage.find(folder)),
                "read_s": reading,
                "resume_s": reading + building,
            }
        )
        storage.delete(run_dir)
    engine.destroy()
    return rows


def text(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    header = ("trained", "parameters", "place", "s blocked", "longest pause, s", "s until safe", "MiB", "s to read", "s to go on")
    names = ("trained", "parameters", "place", "blocked_s", "longest_pause_s", "total_s", "bytes", "read_s", "resume_s")
    rows = [[row[name] if name != "bytes" else row[name] / 2**20 for name in names] for row in report["checkpoints"]]
    settings = report["settings"]
    note = "" if settings["s3"] else " The S3 server (`weed`) is not installed: local disk only."
    return (
        f"{machine_line(report['machine'])}.\n\nShape {settings['shape']}, {settings['threads']} threads, median of "
        f"{settings['repeats']}.{note}\n\n{markdown(header, rows)}"
    )


def _longest_pause(writer: CheckpointWriter) -> float:
    """Seconds, at most, for which this thread could not run Python while another one saved."""
    longest, last = 0.0, time.perf_counter()
    while writer.busy:
        sum(range(100))
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


@contextmanager
def _s3_server() -> Iterator[str | None]:
    """A bucket on a server of our own, its credentials in the environment; None where the binary is missing."""
    if not (shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")):
        yield None
        return
    from cluster.local.seaweed import SeaweedServer

    server = SeaweedServer().start()
    try:
        os.environ.update(server.env())
        server.create_bucket(BUCKET)
        yield f"s3://{BUCKET}"
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
