"""How many tokens a forward pass of this run may hold: the estimate of `ctrsink plan`, with the memory that is free now."""

import logging
import os
from collections.abc import Callable

import psutil
import torch

from ctrsink.config import RunSpec
from ctrsink.config.stages import StageSpec
from ctrsink.dist import Topology, all_max
from ctrsink.estimate.budget import tokens_within
from ctrsink.estimate.held import held
from ctrsink.estimate.stage import estimated
from ctrsink.families.facts import Facts
from ctrsink.stream.stream import SequenceSource
from ctrsink.train.engine import Engine

log = logging.getLogger("ctrsink.train")
GIB = 2**30


def fitting(engine: Engine, spec: RunSpec, facts: Facts, precision: str, source: SequenceSource, stage: StageSpec) -> int:
    """Tokens of a micro-batch, the same on all ranks: what the rank with the least memory can hold; every rank must call it.

    What weights and the optimiser hold is held already; gradients and what else a step needs are reserved. On CUDA a pass of that
    size is tried, and half of it as long as it does not fit; under ZeRO-3, and with sharded tables, a rank that fails alone
    would leave the others waiting, so there the estimate stands.
    """
    topology = engine.topology
    plan = estimated(spec, stage, facts, precision, source)
    own = held(plan.weights, engine.zero_stage, topology.world, spec.train.offload, topology.device != "cpu")
    reserved = sum(own.step.values()) + (own.static.get("gathered", 0))  # nothing is gathered before the first pass
    given = None if spec.train.memory_gib is None else spec.train.memory_gib * GIB
    tokens = max(1, tokens_within(plan.activations, free_bytes(topology.device), reserved, given))
    tokens = -all_max(-tokens, topology)
    if topology.device != "cpu" and engine.zero_stage < 3 and not engine.tables.all:
        tokens = halved(tokens, lambda count: _computed(engine, source, stage, count), topology)
    log.info("micro-batches of %d tokens fit into the memory of a worker", tokens)
    return tokens


def halved(tokens: int, compute: Callable[[int], None], topology: Topology) -> int:
    """The first of `tokens`, a half, a quarter, ... that `compute` has memory for on every rank; 1 is not tried. Collective."""
    while tokens > 1:
        failed = 0
        try:
            compute(tokens)
        except torch.OutOfMemoryError:
            failed = 1
        if failed and topology.device != "cpu":
            torch.cuda.empty_cache()
        if not all_max(failed, topology):
            break
        log.warning("a micro-batch of %d tokens does not fit into the memory of every worker: half of it is tried", tokens)
        tokens //= 2
    return tokens


def _computed(engine: Engine, source: SequenceSource, stage: StageSpec, tokens: int) -> None:
    """A pass forward and back over about so many tokens, whose gradients go nowhere."""
    long = source.some()
    times = max(1, tokens // source.build(long).tokens)
    batch = engine.model.drawn(source.build(long.repeat(times)), stage.learns, 0).to(engine.topology.device)
    # Not by backward: DeepSpeed would reduce what it adds to.
    torch.autograd.grad(engine.model(batch, stage.learns).loss, list(engine.named.values()), allow_unused=True)


def free_bytes(device: str) -> float:
    """Memory of the device that nobody uses, this worker's share of it on a host of several CPU workers."""
    if device.startswith("cuda"):
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
