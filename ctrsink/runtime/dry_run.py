"""`ctrsink train --dry-run`: a process group in which all other ranks are made up."""

import os
from typing import Any

from ctrsink.config import RunSpec
from ctrsink.runtime.preflight import check
from ctrsink.runtime.process import prepare_process


def dry_run_here(spec: RunSpec) -> dict[str, Any]:
    """One step of every stage as the first of `runtime.workers` workers, in this process; see train.dry_run.

    Raises:
        InputError: see preflight.check and train.dry_run.
    """
    world = spec.runtime.most_workers
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world) if spec.runtime.device == "cpu" else "1"
    )
    facts = check(spec)
    runtime = spec.runtime
    prepare_process(runtime.device, runtime.cpus_per_worker, deterministic=runtime.deterministic)
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ctrsink.dist import Topology
    from ctrsink.train.dry_run import dry_run

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        device = "cuda:0" if spec.runtime.device == "cuda" else "cpu"
        return {"stages": dry_run(spec, facts, Topology(0, world, device))}
    finally:
        dist.destroy_process_group()
