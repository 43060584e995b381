"""`ctrsink plan`: what a run takes, before money is spent."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctrsink.config import RunSpec
from ctrsink.config.stages import StageSpec
from ctrsink.dataset.reader import Dataset
from ctrsink.errors import InputError
from ctrsink.estimate.budget import tokens_within
from ctrsink.estimate.devices import Device
from ctrsink.estimate.held import Held, held, resident
from ctrsink.estimate.host import data_bytes, host_memory, nbytes, read_in_epoch
from ctrsink.estimate.stage import StageEstimate, estimated
from ctrsink.estimate.traffic import sent
from ctrsink.estimate.weights import Weights
from ctrsink.estimate.work import Sample
from ctrsink.families.facts import Facts
from ctrsink.families.registry import family_of, source_of

ADAM = 28
"""Bytes that AdamW moves for each number in fp32: weight, gradient and two moments read, all but the gradient written."""


@dataclass(frozen=True)
class Place:
    """Where a run is planned to be."""

    device: Device
    name: str
    """Of the device."""
    nodes: int = 1
    per_node: int = 1
    utilisation: float = 0.35
    """Share of the device's peak that training is taken to reach."""
    network: float = 50e9
    """Bytes per second that a node sends to others."""
    price: float | None = None
    """Of one device for an hour."""
    gpu: bool = True

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def link(self) -> float | None:
        """Bytes per second that a device sends: within its node, or its share of the network."""
        return self.device.link if self.nodes == 1 else self.network / self.per_node


class Planner:
    """Reads a data set's index and a few shards, and knows the shape of the model in every stage.

    Args:
        spec: the run; `train.precision` is not auto.

    Raises:
        InputError: data or model are not as they must be.
    """

    def __init__(self, spec: RunSpec, facts: Facts) -> None:
        self.spec = spec
        family = family_of(spec.model.family)
        self.dataset = Dataset.of(spec.data)
        source = source_of(self.dataset, "train", family.layout(spec.data, spec.model, self.dataset.manifest))
        self.sample = Sample.of(source)
        self.pieces, self.longest = sum(source.per_shard), source.build(source.some()).tokens
        self.impressions = self.dataset.manifest.splits["train"].impressions
        self.shard = float(np.mean([nbytes(self.dataset.shard(number)) for number in self.sample.shards]))
        precision, batch = spec.train.precision, self.sample.batch
        self.stages = [(stage, estimated(spec, stage, facts, precision, source, batch)) for stage in spec.stages]

    def told(self, place: Place) -> dict[str, Any]:
        """All that `ctrsink plan` tells of one place, as plain values: bytes, seconds, numbers."""
        for stage in self.spec.stages:
            if (batch := self.spec.batch_size(stage)) < place.world:
                raise InputError(
                    f"stages.{stage.name}: a batch of {batch} sequences leaves some of {place.world} workers without work: "
                    "take a larger batch_size or fewer devices"
                )
        return {
            "device": place.name,
            "nodes": place.nodes,
            "per_node": place.per_node,
            "precision": self.spec.train.precision,
            "zero_stage": self.spec.train.zero_stage,
            "data": {
                "impressions": self.impressions,
                "sequences": self.pieces,
                "tokens_per_sequence": self.sample.tokens,
                "bytes": data_bytes(self.spec, self.dataset),
            },
            "stages": [self._stage(stage, found, place) for stage, found in self.stages],
        }

    def _held(self, weights: Weights, zero_stage: int, place: Place) -> Held:
        return held(weights, zero_stage, place.world, self.spec.train.offload and zero_stage > 0, place.gpu)

    def _stage(self, stage: StageSpec, estimate: StageEstimate, place: Place) -> dict[str, Any]:
        spec, (weights, line, flops) = self.spec, estimate
        assert flops is not None
        each = flops.total / self.sample.batch.impressions
        own = self._held(weights, spec.train.zero_stage, place)
        given = None if spec.train.memory_gib is None else spec.train.memory_gib * 2**30
        fits = tokens_within(line, place.device.memory - sum(own.static.values()), sum(own.step.values()), given)
        batch = spec.batch_size(stage)
        per_rank = batch / place.world * self.sample.tokens
        asked = spec.train.micro_batch_tokens
        micro = fits if asked == "auto" else asked or spec.train.micro_batch_size * self.sample.tokens
        micro_batches = max(1, math.ceil(per_rank / max(micro, self.sample.tokens)))
        # Sequences are dealt out by length, so the longest of a step come together; one that is too long stands alone.
        most = fits if asked == "auto" else asked or spec.train.micro_batch_size * self.longest
        fullest = max(self.longest, min(most, math.ceil(batch / place.world) * self.longest))
        moved = sent(weights, spec.train.zero_stage, place.world, micro_batches, line.fetched * per_rank)
        total = self.impressions / self.pieces  # impressions of a sequence, over the whole split
        step = self._step(weights, each * batch * total / place.world, place, sum(moved.values()))
        steps = math.ceil(self.pieces / batch)
        peak = own.peak(line.bytes(fullest))
        if not place.gpu:
            peak = resident(sum(own.static.values()), peak)
        found = {
            "stage": stage.name,
            "parameters": {
                "trainable": weights.trained + (weights.in_tables if weights.tables_trained else 0),
                "frozen": weights.frozen + (0 if weights.tables_trained else weights.in_tables),
                "groups": weights.groups,
            },
            "memory": {f"zero_{zero}": self._memory(weights, zero, place) for zero in range(4)},
            "micro_batch": {
                "largest_tokens": fits,
                "largest_sequences": int(fits / self.sample.tokens),
                "tokens": fullest,
                "per_step": micro_batches,
                "activations": line.bytes(fullest),
                "peak": peak,
            },
            "flops_per_impression": each,
            "step": step | {"steps_per_epoch": steps, "impressions": batch * total, "sent": moved},
            "host_memory": host_memory(
                spec, self.dataset, self.shard, weights, sum(own.host.values()), place.per_node, place.world, place.gpu
            ),
        }
        limits = self._limit(step, peak, place)
        if step["seconds"] is not None:
            hours = steps * step["seconds"] / 3600
            found["epoch"] = {
                "impressions_per_s": batch * total / step["seconds"],
                "hours": hours,
                "storage_bytes_per_s": read_in_epoch(spec, self.dataset, place.per_node) / (hours * 3600),
            }
            if place.price is not None:
                found["epoch"]["cost"] = hours * place.world * place.price
        return found | {"limited_by": limits}

    def _memory(self, weights: Weights, zero_stage: int, place: Place) -> dict[str, Any]:
        own = self._held(weights, zero_stage, place)
        return {"static": own.static, "step": own.step, "after": own.after, "host": own.host, "total": own.device}

    def _step(self, weights: Weights, flops: float, place: Place, moved: float) -> dict[str, Any]:
        """Seconds of a worker's step by part, None where the device is not known well enough."""
        device, zero = place.device, self.spec.train.zero_stage
        parted = weights.trained if zero == 0 else weights.trained / place.world
        most = device.flops if self.spec.train.precision == "bf16" else device.fp32
        compute = flops / (most * place.utilisation) if most else None
        optimiser = ADAM * parted / device.bandwidth if device.bandwidth else 0.0
        # One device sends nothing; a place whose links are not known is taken to hide what it sends.
        talking = moved / place.link if place.link and place.world > 1 else 0.0
        if compute is None:
            return {"flops": flops, "compute": None, "optimiser": None, "communication": None, "seconds": None, "hides": None}
        hidden = place.gpu and zero >= 2  # reduced while it is computed; else behind it
        return {
            "flops": flops,
            "compute": compute,
            "optimiser": optimiser,
            "communication": talking,
            "seconds": (max(compute, talking) if hidden else compute + talking) + optimiser,
            "hides": moved / compute,
        }

    def _limit(self, step: dict[str, Any], peak: float, place: Place) -> str:
        if peak > place.device.memory:
            return f"memory: the step needs {peak / 2**30:.1f} GiB, the device has {place.device.memory / 2**30:.1f}"
        if step["seconds"] is None:
            return "not known: give runtime.peak_tflops, or a GPU"
        parts = {part: step[part] for part in ("compute", "communication", "optimiser")}
        most = max(parts, key=lambda part: parts[part])
        link = (place.link or 0.0) / 1e9
        reason = {
            "compute": "the products of the model",
            "communication": f"{step['hides'] / 1e9:.3g} GB/s would hide what each rank sends, it has {link:.3g}",
            "optimiser": "the memory's bandwidth, which AdamW needs whole for every weight that is trained",
        }[most]
        return f"{most}: {reason}"
