"""What the processes of test_scale do: `python -m tests.scale_ranks RANK WORLD STORE DATA FOLDER`; prints a JSON line per run."""

import json
import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

CASES = tuple(product((0, 1, 2, 3), (1, 4)))
"""ZeRO stage and accumulation."""


def tree(data: str, folder: str, world: int, zero: int, accumulation: int) -> dict[str, Any]:
    """A run of the same global batches whatever shares them out: fp32, no dropout, since that differs by rank."""
    from tests.runs import run_tree

    return run_tree(
        data,
        f"{folder}/world{world}-zero{zero}-accumulation{accumulation}",
        model={"backbone": {"config": {"attention_dropout": 0.0}}},
        train={"zero_stage": zero, "micro_batch_size": 8 // (world * accumulation)},
        runtime={"kind": "ray" if world > 1 else "local", "workers": world},
    )


def frozen(trainer: Any) -> dict[str, torch.Tensor]:
    """Whole values of the weights that the present stage does not train; collective."""
    import deepspeed

    found = {}
    for name, parameter in trainer.engine.model.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found[name] = parameter.detach().clone()
    return found


def main(rank: int, world: int, store: str, data: str, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    from ctrsink.runtime.process import prepare_process

    prepare_process("cpu", 1, 1)
    import torch.distributed as dist

    from ctrsink.config import parse_run
    from ctrsink.dist import Topology
    from ctrsink.families.decoder.build import build_model
    from ctrsink.runtime import preflight
    from ctrsink.train.loop import Trainer

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for zero, accumulation in CASES:
        spec = parse_run(tree(data, folder, world, zero, accumulation), "test")
        facts = preflight.check(spec)
        first = Trainer(spec, Topology(rank, world), facts)
        first.run(stop_after=8)  # the first stage
        before = dict(build_model(spec.model, facts.vocabulary, spec.seed).named_parameters())
        left = frozen(first)
        same = bool(left) and all(torch.equal(value, before[name]) for name, value in left.items())
        first.engine.destroy()
        result = Trainer(spec, Topology(rank, world), facts).run()
        print(json.dumps({"frozen_unchanged": same, "checksum": result["checksum"], "finished": result["finished"]}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *(str(Path(arg)) for arg in sys.argv[3:6]))
