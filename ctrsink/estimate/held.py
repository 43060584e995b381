"""What the engine holds on a rank, by part, for each ZeRO stage: the facts of DeepSpeed 0.19.8 as train/engine.py sets it up.

All of them stand here. Compared with engines that were built, in tests/test_held.py, and with resident memory, in
benchmarks/plan_accuracy.py.
"""

from dataclasses import dataclass

from ctrsink.estimate.weights import Weights
from ctrsink.tables.shares import bytes_needed

MASTER, MOMENTS, GRADIENT = 4, 8, 4
"""Bytes for each number that is trained: ZeRO's own fp32 copy, Adam's two moments, a gradient. The weights themselves are counted
in the type that they have in the model, see Weights."""
MOST_IN_BUCKET = 200_000_000
"""Numbers of a reduction bucket at most, see engine.deepspeed_config."""
HOLES = 0.5
"""On a CPU, of what comes and goes in a step: what glibc keeps beside it, between tensors of other sizes. Measured for three
sizes, docs/plan.md; none of it is there where every large tensor has pages of its own."""
LIVE = 1_000_000_000
"""Numbers that ZeRO-3 keeps gathered at a time, at most (stage3_max_live_parameters, stage3_max_reuse_distance)."""


@dataclass(frozen=True)
class Held:
    """Bytes of one rank."""

    static: dict[str, int]
    """On the device, between two steps, by part."""
    step: dict[str, int]
    """On the device besides, while a step is computed; activations not counted."""
    after: dict[str, int]
    """Besides, when the activations are gone: what reduces and steps."""
    host: dict[str, int]
    """In the host's memory, where the engine offloads."""

    @property
    def device(self) -> int:
        """All that activations must leave free."""
        return sum(self.static.values()) + sum(self.step.values())

    def peak(self, activations: float) -> float:
        """At the fullest moment of a step with so many bytes of activations."""
        return self.device + max(activations, sum(self.after.values()))


def resident(static: float, peak: float) -> float:
    """Bytes that a process on a CPU grows by: of a model that holds `static` between two steps, `peak` at the fullest moment."""
    return static + (1 + HOLES) * (peak - static)


def held(weights: Weights, zero_stage: int, world: int, offload: bool = False, overlap: bool = False) -> Held:
    """What the fullest of `world` ranks holds.

    Args:
        overlap: the engine reduces while it computes (on CUDA), with two buckets.
    """
    trained, parted = weights.trained, -(-weights.trained // world)
    bucket = GRADIENT * min(trained, MOST_IN_BUCKET)
    static = {"weights": weights.bytes}
    step: dict[str, int] = {}
    # On CUDA AdamW steps all weights at a time, with a root of each second moment.
    after = {"adam": GRADIENT * (trained if zero_stage == 0 else parted)} if overlap and not offload else {}
    if zero_stage == 0:
        static["moments"] = MOMENTS * trained
        step["gradients"] = GRADIENT * trained
        if world > 1:
            after["buckets"] = bucket  # gradients are reduced in a flat copy, at the end
    elif zero_stage < 3:
        static |= {"masters": MASTER * parted, "moments": MOMENTS * parted}
        step["gradients"] = GRADIENT * (parted if zero_stage == 2 else trained)
        step["buckets"] = bucket * (2 if overlap else 1)
    else:
        static |= {
            "weights": -(-weights.bytes // world),
            "masters": MASTER * parted,
            "moments": MOMENTS * parted,
            "gradients": GRADIENT * parted,
            "buckets": bucket,
            "gathered": weights.persistent_bytes,
        }
        whole = min(weights.bytes, round(LIVE * weights.bytes / max(weights.trained + weights.frozen, 1)))
        step["gathered"] = max(0, whole - weights.persistent_bytes)
        # Weights are gathered many at a time, and what a module works with are copies of its own: here of two matrices.
        step["copies"] = min(2 * weights.largest_bytes, step["gathered"])
        step["buckets"] = bucket  # a copy in the order of the ranks, which is reduced
    host: dict[str, int] = {}
    if offload:
        for part in ("masters", "moments", *(("weights", "gradients") if zero_stage == 3 else ())):
            host[part] = static.pop(part)
    if weights.tables:
        static["tables"] = sum(bytes_needed(rows, width, world) for rows, width in weights.tables)
    return Held(static, step, after, host)
