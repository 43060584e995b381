"""What `ctrsink plan` says against what is measured: memory of engines under ZeRO 0 to 3, resident memory, FLOPs.

Each engine is made, and steps twice, in a process of its own, as the first of two ranks of which the other is made up
(`ctrsink train --dry-run`). A tiny model has made the same steps there before, so that libraries, their pools and Python, which
any run has, are told apart ("base") from what the measured model adds to resident memory, which is the kernel's own peak.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import machine, machine_line, markdown
from benchmarks.zero3_memory import resident
from ctrsink.estimate.held import resident as resident_by_plan

_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES = {
    "tiny": dict(zip(_FIELDS, (64, 128, 2, 2, 2), strict=True)),  # what is run first
    "17M": dict(zip(_FIELDS, (384, 1024, 10, 6, 6), strict=True)),
    "46M": dict(zip(_FIELDS, (576, 1536, 13, 9, 3), strict=True)),
    "106M": dict(zip(_FIELDS, (576, 1536, 30, 9, 3), strict=True)),  # SmolLM2-135M without its vocabulary
}
WORLD = 2


def run_of(work: Path, size: str, zero_stage: int, weights: str = "fp32") -> Any:
    """All weights of a random Llama trained on a made-up log, in fp32 or, held in it too, in bf16."""
    from ctrsink.config import parse_run

    groups = ["sink", "bias", "head", "backbone"]
    tree = {
        "run_dir": str(work / "run"),
        "data": {"uri": str(work / "data"), "examples": "per_target", "history": 20},
        "prepare": {
            "source": {
                "kind": "table",
                "path": str(work / "raw/events"),
                "items": str(work / "raw/items.csv"),
                "columns": {"user": "user", "item": "item", "timestamp": "timestamp", "feedback": "click", "label": "click"},
            },
            "text": {"item": "{title}, {genre}", "feedback": " {feedback:g}"},
            "tokenizer": {"train_vocabulary": 1024},
        },
        "model": {"backbone": {"config": {"model_type": "llama", "max_position_embeddings": 4096} | SIZES[size]}},
        "stages": [{"name": "all", "trainable": groups, "lr": dict.fromkeys(groups, 1e-4), "steps": 2}],
        "train": {"batch_size": 8, "micro_batch_size": 2, "zero_stage": zero_stage, "precision": weights, "weights": weights},
        "runtime": {"kind": "ray", "workers": WORLD},
    }
    return parse_run(tree, "plan_accuracy")


def measure(work: Path, size: str, zero_stage: int, weights: str) -> dict[str, Any]:
    """In this process: dry runs of a tiny model and of this one, and how far resident memory rose above what the first left."""
    from ctrsink.runtime.dry_run import dry_run_here
    from ctrsink.runtime.preflight import check
    from ctrsink.train import dry_run
    from ctrsink.train.host_memory import give_back

    base, estimated, whole = 0, dry_run.estimated, dry_run.dry_run

    def after_a_tiny_one(spec: Any, facts: Any, topology: Any) -> Any:
        tiny = run_of(work, "tiny", zero_stage, weights)
        whole(tiny, check(tiny), topology)
        dry_run.estimated = last_before_the_model
        return whole(spec, facts, topology)

    def last_before_the_model(*given: Any) -> Any:
        nonlocal base
        found = estimated(*given)
        gc.collect()
        give_back()
        base = resident("VmRSS", reset=True)
        return found

    dry_run.dry_run = after_a_tiny_one
    (found,) = dry_run_here(run_of(work, size, zero_stage, weights))["stages"]
    return {"size": size, "zero_stage": zero_stage, **found, "base": base, "resident": resident("VmHWM") - base}


def counted(work: Path, size: str) -> dict[str, Any]:
    """FLOPs of a training step by the family's count and by torch's, which takes attention for a whole square of pairs."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from ctrsink.dataset.reader import Dataset
    from ctrsink.estimate.activations import become_fake
    from ctrsink.estimate.weights import weights_of
    from ctrsink.families.registry import family_of, source_of
    from ctrsink.runtime.preflight import check

    spec = run_of(work, size, 0)
    family, dataset, stage = family_of(spec.model.family), Dataset.of(spec.data), spec.stages[0]
    source = source_of(dataset, "train", family.layout(spec.data, spec.model, dataset.manifest))
    shape = family.shape(spec.model, check(spec)).train()
    parameters = weights_of(shape, stage.trainable).trained
    batch = source.build(source.some().repeat(4))
    ours = shape.flop_count(stage.learns)(batch)
    with FakeTensorMode() as mode:
        become_fake(shape)
        with FlopCounterMode(display=False) as counter:
            shape(batch.mapped(mode.from_tensor), stage.learns).loss.backward()
    return {
        "size": size,
        "parameters": parameters,
        "tokens": batch.tokens / 4,
        "ours": ours.total,
        "attention": ours.attention,
        "torch": counter.get_total_flops(),
    }


def main() -> None:
    """Prepare the data once, measure size by size, print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, metavar="DIR")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES)[1:])
    parser.add_argument("--stages", nargs="+", type=int, choices=range(4), default=list(range(4)), help="of ZeRO")
    parser.add_argument("--weights", choices=["fp32", "bf16"], default="fp32", help="train.weights, and the precision")
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "ZERO"), help="measure in this process")
    args = parser.parse_args()
    work = Path(args.work)
    if args.one:
        print(json.dumps(measure(work, args.one[0], int(args.one[1]), args.weights)))
        return
    if not (work / "data/manifest.json").exists():
        from ctrsink.prepare.build import prepare
        from ctrsink.prepare.synth import synth

        synth(str(work / "raw"), 4000, 100, 500, 0, "csv")
        spec = run_of(work, args.sizes[0], 0)
        prepare(spec.prepare, spec.data.uri)
    print(machine_line(machine()))
    rows = []
    for size in args.sizes:
        for zero_stage in args.stages:
            same = ["--work", str(work), "--weights", args.weights]
            command = [sys.executable, "-m", "benchmarks.plan_accuracy", *same, "--one", size, str(zero_stage)]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}, check=True)
            rows.append(_memory_row(json.loads(done.stdout.splitlines()[-1])))
            print(*rows[-1], file=sys.stderr, flush=True)
    header = (
        "size",
        "ZeRO",
        "held MiB",
        "planned",
        "ratio",
        "peak MiB",
        "planned",
        "ratio",
        "base MiB",
        "resident MiB",
        "planned",
        "ratio",
    )
    print("\n" + markdown(header, rows))
    flops = []
    for size in args.sizes:
        one = counted(work, size)
        given = [one[key] / 1e9 for key in ("ours", "attention", "torch")]
        flops.append([size, one["parameters"], one["tokens"], *given, f"{one['ours'] / one['torch']:.3f}"])
    print("\n" + markdown(("size", "parameters", "tokens", "GFLOP", "of it attention", "torch counts", "ratio"), flops))


def _memory_row(found: dict[str, Any]) -> list[str]:
    row = [found["size"], str(found["zero_stage"])]
    for what in ("held", "peak"):
        measured, planned = found[what]["measured"], found[what]["planned"]
        row += [f"{measured / 2**20:.0f}", f"{planned / 2**20:.0f}", f"{planned / measured:.3f}"]
    planned = resident_by_plan(found["held"]["planned"], found["peak"]["planned"])
    row += [f"{value / 2**20:.0f}" for value in (found["base"], found["resident"], planned)]
    return [*row, f"{planned / found['resident']:.3f}"]


if __name__ == "__main__":
    main()
