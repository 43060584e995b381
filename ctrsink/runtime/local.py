"""One process, no Ray: the loop in a process group of one."""

import os
from typing import Any

from ctrsink.config import RunSpec
from ctrsink.dist import Topology
from ctrsink.families.facts import Facts
from ctrsink.run.listing import Step
from ctrsink.runtime.process import prepare_process
from ctrsink.runtime.stalls import BEFORE, Stalls
from ctrsink.runtime.stopping import StopRequests, on_sigterm


def train_local(spec: RunSpec, facts: Facts, stop_after: int | None = None) -> dict[str, Any]:
    """Train in this process; see Trainer.run."""
    topology = _alone(spec)
    from ctrsink.train.host_hooks import HostHooks
    from ctrsink.train.loop import Trainer

    asked: list[str] = []
    requests = StopRequests(spec.run_dir)
    stalls = Stalls(BEFORE)
    hooks = HostHooks(stop=lambda: asked[0] if asked else requests.reason(), doing=stalls.doing)
    try:
        with on_sigterm(asked.append):
            return Trainer(spec, topology, facts, hooks).run(stop_after)
    finally:
        stalls.close()
        requests.close()


def evaluate_local(spec: RunSpec, facts: Facts, step: Step) -> dict[str, dict[str, float]]:
    """Measure the run's checkpoint in this process; see evaluate_together."""
    topology = _alone(spec)
    from ctrsink.train.measure_together import evaluate_together

    return evaluate_together(spec, topology, facts, step)


def _alone(spec: RunSpec) -> Topology:
    """This process as a group of one, on the run's device."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    device = "cuda:0" if spec.runtime.device == "cuda" else "cpu"
    prepare_process(spec.runtime.device, spec.runtime.cpus_per_worker, deterministic=spec.runtime.deterministic)
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("nccl" if device != "cpu" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return Topology(device=device)
