"""How many tokens a forward pass may hold: what activations of one batch weigh, against the memory that is free."""

import logging
import os
from collections.abc import Callable

import psutil
import torch
from torch import nn

from ctrsink.config.stages import StageSpec
from ctrsink.dist import all_max
from ctrsink.families.protocol import CTRModule
from ctrsink.sequences.batch import Batch
from ctrsink.stream.stream import SequenceSource
from ctrsink.train.engine import Engine

log = logging.getLogger("ctrsink.train")
SHARE = 0.6  # of the free memory: the backward pass and the allocator need the rest
GIB = 2**30


def fitting(engine: Engine, source: SequenceSource, stage: StageSpec, memory_gib: float | None) -> int:
    """Tokens of a micro-batch, the same on all ranks: what the rank with the least memory can hold; every rank must call it."""
    batch = engine.model.drawn(source.build(source.some()), stage.learns, 0)
    own = tokens_within(engine.model, lambda batch: engine.forward(batch, stage.learns).loss, batch, memory_gib)
    tokens = -all_max(-own, engine.topology)
    log.info("micro-batches of %d tokens fit into the memory of a worker", tokens)
    return tokens


def tokens_within(model: CTRModule, forward: Callable[[Batch], torch.Tensor], batch: Batch, memory_gib: float | None) -> int:
    """Tokens whose activations fit into `memory_gib`, or into most of what is free.

    Activations grow with the tokens of a packed row, so one pass over a small `batch` says how much a token needs.

    Args:
        forward: a training forward pass; under ZeRO-3 every rank must make it.
    """
    memory = memory_gib * GIB if memory_gib is not None else SHARE * free_bytes(next(model.parameters()).device)
    kept = saved_bytes(lambda: forward(batch), model) + model.hidden_bytes(batch.tokens)
    return max(1, int(memory * batch.tokens / max(kept, model.least_bytes(batch.tokens), 1)))


def saved_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not isinstance(tensor, nn.Parameter):
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()  # held: freed storages would be counted once for several
    del out
    return sum(seen.values())


def free_bytes(device: torch.device) -> float:
    """Memory of the device that nobody uses, this worker's share of it on a host of several CPU workers."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
