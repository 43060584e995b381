"""What a rank's memory holds while a model is built under ZeRO-3, and when its engine stands; one process per rank, on CPU.

The peak is the kernel's own (`VmHWM`), less what the process held before: torch, DeepSpeed and their threads. Beside it the limit
that a sharded build is to keep, 1.3 times the rank's share of the weights and the largest of them. `--checkpoint` saves what
stands, and lets new processes go on from it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import machine, machine_line, markdown
from benchmarks.shapes import SHAPES, shape_of
from ctrsink import strict_json

VOCABULARY = 32_000
MIB = 2**20
TRAINED = {"LoRA": ["sink", "bias", "head", "lora"], "whole backbone": ["sink", "bias", "head", "backbone"]}


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    if args.rank is not None:
        print(json.dumps(measure(args)), flush=True)
        return 0
    rows = [run(args, shape, world, how, trained) for shape in args.shapes for world in args.worlds for trained in args.trained
            for how in args.how]  # fmt: skip
    report = {"machine": machine(), "precision": args.precision, "rows": rows}
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.zero3_memory", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["0.3b"])
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 4], help="numbers of processes")
    parser.add_argument("--trained", nargs="+", choices=list(TRAINED), default=["LoRA"])
    parser.add_argument(
        "--how", nargs="+", choices=["sharded", "whole"], default=["sharded"], help="whole: as DeepSpeed alone does"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the weights that are not trained")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--checkpoint", action="store_true", help="save a checkpoint, and go on from it in new processes")
    for name in ("rank", "store", "saved", "resumed"):  # of a process that this one starts
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(args: argparse.Namespace, shape: str, world: int, how: str, trained: str) -> dict[str, Any]:
    """A row of the table: the largest figures of all ranks."""
    row: dict[str, Any] = {"shape": shape, "world": world, "how": how, "trained": trained}
    with tempfile.TemporaryDirectory() as folder:
        row |= started(args, row, ["--saved", folder] if args.checkpoint else [])
        if args.checkpoint:
            again = started(args, row, ["--resumed", folder])
            row |= {f"resume_{name}": again[name] for name in ("engine_peak", "engine_held", "seconds")}
    return row


def started(args: argparse.Namespace, row: dict[str, Any], more: list[str]) -> dict[str, Any]:
    """What the ranks of a row print: the largest figures."""
    world = row["world"]
    with tempfile.TemporaryDirectory() as folder:
        same = ["--shapes", row["shape"], "--worlds", str(world), "--how", row["how"], "--trained", row["trained"]]
        same += ["--precision", args.precision, *more]
        command = [sys.executable, "-m", "benchmarks.zero3_memory", *same, "--store", f"{folder}/store", "--rank"]
        ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(world)]
        try:
            printed = [rank.communicate(timeout=1800)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(rank.returncode for rank in ranks):
            raise SystemExit("a rank failed: see above")
    found = [json.loads(lines.splitlines()[-1]) for lines in printed]
    return {name: max(one[name] for one in found) for name in found[0]}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """In a rank's own process: MiB and seconds."""
    rank, world, (shape,), (how,), (trained,) = int(args.rank), args.worlds[0], args.shapes, args.how, args.trained
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    from ctrsink.runtime.process import prepare_process

    prepare_process("cpu", 1, 1)
    import torch
    import torch.distributed as dist

    from ctrsink.config import parse_run
    from ctrsink.dist import Topology
    from ctrsink.families.facts import Facts
    from ctrsink.train import built as building
    from ctrsink.train.checkpoint.checkpoint import FILES, Checkpoint
    from ctrsink.train.checkpoint.native import restore
    from ctrsink.train.checkpoint.shared import save_shared
    from ctrsink.train.engine import Engine, EngineState

    dist.init_process_group("gloo", init_method=f"file://{args.store}", rank=rank, world_size=world)
    topology, spec = Topology(rank, world), parse_run(tree(shape, trained, world), "benchmark")
    if how == "whole":
        building.InParts.__enter__ = lambda self: self
        building.InParts.__exit__ = lambda self, exc_type, exc_val, exc_tb: None
    building.built(parse_run(tree("test", trained, world), "warm-up"), spec.stages[0], Facts(97), topology, "fp32", {})
    before = resident("VmRSS", reset=True)
    start = time.monotonic()
    parameters, state = {}, None
    if args.resumed is not None:
        found = restore(args.resumed, 3, topology)
        assert found is not None
        parameters, state = found[0].parameters, EngineState({}, found[0].moments, found[0].steps)
    model = building.built(spec, spec.stages[0], Facts(VOCABULARY), topology, args.precision, parameters)
    seconds = time.monotonic() - start
    built, kept = resident("VmHWM", reset=True), resident("VmRSS")
    shards = [(p.ds_numel, p.ds_tensor.nbytes, p.ds_tensor.element_size()) for p in model.parameters()]  # pyright: ignore[reportAttributeAccessIssue]
    engine = Engine(model, spec, spec.stages[0], topology, state)
    stands = resident("VmHWM", reset=True), resident("VmRSS")
    if args.saved is not None:
        whole = engine.given_state()
        checkpoint = Checkpoint(1, 1, whole.parameters, whole.moments, whole.steps, "0" * 64)
        save_shared(args.saved, checkpoint, FILES, lambda folder: {}, topology, lambda: None)
    saving = resident("VmHWM")
    dist.barrier()
    del engine
    dist.destroy_process_group()
    share, largest = sum(one[1] for one in shards), max(numel * size for numel, _, size in shards)
    return {
        "parameters": sum(one[0] for one in shards),
        "share": share / MIB,
        "largest": largest / MIB,
        "limit": (1.3 * share + largest) / MIB,
        "peak": (built - before) / MIB,
        "held": (kept - before) / MIB,
        "engine_peak": (stands[0] - before) / MIB,
        "engine_held": (stands[1] - before) / MIB,
        "save_peak": (saving - before) / MIB,
        "before": before / MIB,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }


def tree(shape: str, trained: str, world: int) -> dict[str, Any]:
    """A run of one stage."""
    groups = TRAINED[trained]
    lora = {"rank": 8} if "lora" in groups else None
    model = {"backbone": {"config": shape_of(shape)}, "bias": {"layers": 0.1}, "lora": lora}
    stage = {"name": "all", "trainable": groups, "lr": dict.fromkeys(groups, 0.001), "steps": 1}
    several = {"runtime": {"kind": "ray", "workers": world}, "train": {"zero_stage": 3}}
    return {"run_dir": "unused", "data": {"uri": "unused"}, "model": model, "stages": [stage], **several}


def resident(name: str, reset: bool = False) -> int:
    """Bytes of this process as the kernel counts them; `reset`: its peak begins anew."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return found


def text(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    columns = {
        "shape": "shape", "parameters": "parameters", "world": "ranks", "trained": "trained", "how": "build", "share": "share",
        "largest": "largest", "limit": "limit", "peak": "peak", "held": "held", "engine_peak": "engine: peak",
        "engine_held": "engine: held", "seconds": "s to build",
    }  # fmt: skip
    if "resume_seconds" in report["rows"][0]:
        columns |= {"save_peak": "save: peak", "resume_engine_peak": "resume: peak", "resume_engine_held": "resume: held"}
    rows = [[row[name] for name in columns] for row in report["rows"]]
    what = f"MiB of the rank with most, weights in {report['precision']}."
    return f"{machine_line(report['machine'])}.\n\n{what}\n\n{markdown(tuple(columns.values()), rows)}"


if __name__ == "__main__":
    sys.exit(main())
