"""Bytes that a rank sends in one optimiser step, by what they are for."""

from ctrsink.estimate.held import GRADIENT, LIVE
from ctrsink.estimate.weights import Weights


def sent(weights: Weights, zero_stage: int, world: int, micro_batches: int, fetched: float) -> dict[str, float]:
    """What each of `world` ranks sends, in rings: an all-reduce is a reduce-scatter and an all-gather of (n - 1) / n each.

    DeepSpeed 0.19.8 reduces gradients by all-reduce under ZeRO 0 to 2 (`use_multi_rank_bucket_allreduce`), once a step under 0
    and 1 and for each micro-batch under 2, and by reduce-scatter for each micro-batch under 3. Weights are gathered after each
    step under 1 and 2; under 3 for each forward pass, and again for the way back where not all fit into LIVE numbers.

    Args:
        micro_batches: of a rank in a step.
        fetched: bytes of the rows of sharded tables that a rank's step names.
    """
    share = (world - 1) / world
    gradients = GRADIENT * weights.trained * share
    found: dict[str, float] = {}
    if zero_stage < 3:
        found["gradients"] = 2 * gradients * (micro_batches if zero_stage == 2 else 1)
        if zero_stage > 0:
            found["weights"] = weights.trained_bytes * share
    else:
        again = 2 if weights.trained + weights.frozen > LIVE else 1
        found["gradients"] = gradients * micro_batches
        found["weights"] = again * micro_batches * share * (weights.bytes - weights.persistent_bytes)
    if weights.tables:
        found["tables"] = share * fetched * (2 if weights.tables_trained else 1)
    return found
