"""What an export holds in memory beside the bytes of the model that it writes; one process each, on CPU.

The peak is the kernel's own (`VmHWM`), which counts pages mapped from files too, and may be given back at any time; beside it the
highest sample of what is mapped from no file. Both less what the process held before: torch, transformers and the data set.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.report import machine, machine_line, markdown
from benchmarks.shapes import SHAPES, shape_of
from ctrsink import strict_json

MIB = 2**20
TRAINED = {
    "LoRA, pretrained": ["sink", "bias", "head", "lora"],
    "LoRA, random": ["sink", "bias", "head", "lora"],
    "whole": ["sink", "bias", "head", "backbone"],
}


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    if args.folder is not None:
        print(json.dumps(measure(args)), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = [run(args, folder, *of) for of in ((s, t, d) for s in args.shapes for t in args.trained for d in args.dtypes)]
    report = {"machine": machine(), "rows": rows}
    print(strict_json.dumps(report) if args.json else text(report))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.export_memory", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["70m", "0.3b"])
    parser.add_argument("--trained", nargs="+", choices=list(TRAINED), default=list(TRAINED))
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    for name in ("folder", "step"):  # of a process that this one starts
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(args: argparse.Namespace, folder: str, shape: str, trained: str, dtype: str) -> dict[str, Any]:
    """A row of the table: a run is written by one process and exported by the next."""
    same = ["--shapes", shape, "--trained", trained, "--dtypes", dtype, "--folder", folder]
    found: dict[str, Any] = {}
    for step in ("written", "exported"):
        command = [sys.executable, "-m", "benchmarks.export_memory", *same, "--step", step]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    return {"shape": shape, "trained": trained, "dtype": dtype} | found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: MiB and seconds of an export, or nothing of the run that it needs."""
    import torch

    from ctrsink.export.package import export_run

    torch.set_num_threads(1)
    folder, (shape,), (trained,), (dtype,) = Path(args.folder), args.shapes, args.trained, args.dtypes
    run_dir = folder / f"{shape}-{trained}"
    if args.step == "written":
        if not run_dir.exists():
            _write_run(folder, str(run_dir), shape, trained)
        return {}
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    held, began = _kib("VmRSS") / 1024, time.monotonic()
    anonymous, peak, ended = _kib("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.01):
            peak = max(peak, _kib("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    with tempfile.TemporaryDirectory() as out:
        done = export_run(str(run_dir), f"{out}/model", dtype)
    ended.set()
    thread.join()
    return {
        "model": done["bytes"] / MIB,
        "peak": _kib("VmHWM") / 1024 - held,
        "anonymous": (peak - anonymous) / 1024,
        "seconds": time.monotonic() - began,
    }


def _write_run(folder: Path, run_dir: str, shape: str, trained: str) -> None:
    """A run whose checkpoint was written by hand: random values, no training."""
    import torch
    from transformers import AutoConfig, AutoModel

    from benchmarks.raw import prepared_data
    from ctrsink.config import parse_run
    from ctrsink.dataset.manifest import read_manifest
    from ctrsink.families.decoder.build import build_model
    from ctrsink.prepare.tokenize import load_tokenizer
    from ctrsink.run.folder import claim
    from ctrsink.train.checkpoint.checkpoint import Checkpoint, save_checkpoint

    data = str(folder / "data")
    if not Path(data).exists():
        prepared_data(folder, 2_000, None, [])
    backbone: dict[str, Any] = {"config": shape_of(shape)}
    vocabulary = len(load_tokenizer(data))
    if "pretrained" in trained:
        path = folder / f"base-{shape}"
        fields = shape_of(shape)
        torch.manual_seed(0)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields, vocab_size=vocabulary)
        AutoModel.from_config(config).save_pretrained(path)
        backbone = {"path": str(path)}
    groups = TRAINED[trained]
    tree = {
        "name": "memory",
        "run_dir": run_dir,
        "data": {"uri": data, "examples": "per_target", "history": 10},
        "model": {"backbone": backbone, "sinks": {"signals": ["time_gap"]}, "lora": {} if "lora" in groups else None},
        "stages": [{"name": "only", "trainable": groups, "lr": dict.fromkeys(groups, 1e-3), "steps": 1}],
    }
    spec = parse_run(tree, "benchmark")
    identity = read_manifest(data).identity
    claim(spec, resume=True, datasets=(identity,))
    model = build_model(spec.model, vocabulary, spec.seed)  # pyright: ignore[reportArgumentType]
    parameters = {n: p.detach() for n, p in model.named_parameters() if model.trained_as(n, tuple(groups))}
    for name, value in parameters.items():
        if "lora_B" in name:
            value.normal_(std=0.01)
    save_checkpoint(run_dir, Checkpoint(1, 8, parameters, {}, {}, identity))


def _kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def text(report: dict[str, Any]) -> str:
    """The table, and the machine."""
    head = ["shape", "trained", "written in", "folder, MiB", "peak, MiB", "of it", "mapped from no file, MiB", "of it", "s"]
    rows = [
        [
            row["shape"], row["trained"], row["dtype"], f"{row['model']:,.0f}", f"{row['peak']:,.0f}",
            f"{row['peak'] / row['model']:.2f}", f"{row['anonymous']:,.0f}", f"{row['anonymous'] / row['model']:.2f}",
            f"{row['seconds']:.0f}",
        ]
        for row in report["rows"]
    ]  # fmt: skip
    return f"{machine_line(report['machine'])}.\n\n{markdown(head, rows)}"


if __name__ == "__main__":
    sys.exit(main())
