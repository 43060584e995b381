"""One step of every stage as a rank of the planned world would make it, with nobody at the other end, and nothing written."""

import gc
import time
from functools import partial
from typing import Any

import torch

from ctrsink.config import RunSpec
from ctrsink.config.stages import StageSpec
from ctrsink.dataset.reader import Dataset
from ctrsink.dist import Topology
from ctrsink.errors import InputError
from ctrsink.estimate.activations import Peak
from ctrsink.estimate.held import held
from ctrsink.estimate.stage import estimated, trained_until
from ctrsink.families.facts import Facts
from ctrsink.families.registry import family_of, source_of
from ctrsink.sequences.batch import Batch
from ctrsink.stream.stream import SequenceSource
from ctrsink.tables.embedding import tables_of
from ctrsink.train.built import built
from ctrsink.train.engine import Engine
from ctrsink.train.loop import seed_step
from ctrsink.train.observe.hardware import precision_of
from ctrsink.train.streams import stream_of
from ctrsink.train.tensors import Source, Tensors


def dry_run(spec: RunSpec, facts: Facts, topology: Topology) -> list[dict[str, Any]]:
    """What each stage held and took, beside what was planned, in bytes and seconds.

    Two steps are made and the second is measured: the first makes buffers that stay. Collectives give back what is put into them,
    so losses and weights mean nothing; memory, kernels and order are those of the run.

    Raises:
        InputError: sharded tables on several ranks, which would wait for rows of others.
    """
    dataset = Dataset.of(spec.data)
    family = family_of(spec.model.family)
    torch.backends.cuda.matmul.allow_tf32 = spec.train.tf32
    if topology.world > 1 and tables_of(family.shape(family.portable(spec.model), facts, "fp32")):
        raise InputError("model.id_tables sharded: a dry run has no other rank to ask for rows: set runtime.workers to 1")
    source = source_of(dataset, "train", family.layout(spec.data, spec.model, dataset.manifest))
    precision = precision_of(spec.train.precision, "", topology)
    return [_stage(spec, stage, facts, precision, source, topology) for stage in spec.stages]


def _stage(
    spec: RunSpec, stage: StageSpec, facts: Facts, precision: str, source: SequenceSource, topology: Topology
) -> dict[str, Any]:
    plan = estimated(spec, stage, facts, precision, source)
    own = held(plan.weights, spec.train.zero_stage, topology.world, spec.train.offload, topology.device != "cpu")
    before = _held(topology.device)
    earlier = _earlier(spec, stage, facts, precision)
    model = built(spec, stage, facts, topology, precision, earlier)
    engine = Engine(model, spec, stage, topology, None)
    step = stream_of(spec, stage, engine, source, facts, precision).step(0)
    drawn = [model.drawn(batch, stage.learns, 0) for batch in step.micro_batches]
    units = step.impressions if stage.objective == "click" else max(1, sum(batch.units or 0 for batch in drawn))
    seed_step(spec.seed, 0, topology.rank)
    engine.step(drawn, units, stage, 1.0)
    batches = _bytes([*step.micro_batches, *drawn, *([step.filler] if step.filler else [])])
    between = _held(topology.device) - before - (batches if topology.device == "cpu" else 0)
    most, seconds = _measured(lambda: engine.step(drawn, units, stage, 1.0), topology.device)
    tokens = max(batch.tokens for batch in drawn)
    engine.destroy()
    return {
        "stage": stage.name,
        "workers": topology.world,
        "precision": precision,
        "micro_batches": len(drawn),
        "tokens": tokens,
        "seconds": seconds,
        "held": {"measured": between, "planned": sum(own.static.values())},
        "peak": {"measured": between + most, "planned": own.peak(plan.activations.bytes(tokens))},
    }


def _earlier(spec: RunSpec, stage: StageSpec, facts: Facts, precision: str) -> Tensors:
    """Zeros for what stages before this one train, which stays in fp32."""
    place = [one.name for one in spec.stages].index(stage.name)
    if not place:
        return Tensors({})
    family, groups = family_of(spec.model.family), trained_until(spec, spec.stages[place - 1])
    shape = family.shape(family.portable(spec.model), facts, precision)
    shapes = {name: each.shape for name, each in shape.named_parameters() if shape.trained_as(name, groups) is not None}
    return Tensors({name: Source(size, partial(torch.zeros, size)) for name, size in shapes.items()})


def _measured(step: Any, device: str) -> tuple[int, float]:
    """Bytes that a step takes beside what is held, at most, and its seconds."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        held_before, began = torch.cuda.memory_allocated(device), time.monotonic()
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held_before, time.monotonic() - began
    began = time.monotonic()
    with Peak(_tensors()) as peak:
        step()
    return peak.most, time.monotonic() - began


def _held(device: str) -> int:
    """Bytes of all tensors of this process that lie on the device."""
    gc.collect()
    if device != "cpu":
        return torch.cuda.memory_allocated(device)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors()}.values())


def _tensors() -> list[torch.Tensor]:
    """All that Python knows of with memory of their own, gradients among them."""
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    found += [each.grad for each in found if each.is_leaf and each.grad is not None]
    return [each for each in found if each.device.type == "cpu" and not hasattr(each, "fake_mode")]


def _bytes(batches: list[Batch]) -> int:
    sizes: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for batch in batches:
        batch.mapped(count)
    return sum(sizes.values())
