"""What a stage holds wherever it runs, counted on the model's shape: for a plan, a dry run and `micro_batch_tokens: auto`."""

from typing import NamedTuple

from ctrsink.config import RunSpec
from ctrsink.config.stages import StageSpec
from ctrsink.estimate.activations import Activations, activations_of
from ctrsink.estimate.weights import Weights, weights_of
from ctrsink.families.facts import Facts
from ctrsink.families.parameters import set_trainable
from ctrsink.families.protocol import Flops
from ctrsink.families.registry import family_of
from ctrsink.sequences.batch import Batch
from ctrsink.stream.stream import SequenceSource


class StageEstimate(NamedTuple):
    """Of one stage."""

    weights: Weights
    activations: Activations
    flops: Flops | None
    """Of a training step on the sample; None: none was given."""


def trained_until(spec: RunSpec, stage: StageSpec) -> tuple[str, ...]:
    """Groups that this stage or one before it trains."""
    names = [one.name for one in spec.stages]
    return tuple({group for one in spec.stages[: names.index(stage.name) + 1] for group in one.trainable})


def estimated(
    spec: RunSpec, stage: StageSpec, facts: Facts, precision: str, source: SequenceSource, sample: Batch | None = None
) -> StageEstimate:
    """Build the model's shape and run it without memory; with the attention that every device has, of which others hold less."""
    family = family_of(spec.model.family)
    shape = family.shape(family.portable(spec.model), facts, precision).train()
    set_trainable(shape, trained_until(spec, stage))  # what was trained once stays in fp32
    weights = weights_of(shape, stage.trainable, spec.train.weights)
    flops = None if sample is None else shape.flop_count(stage.learns)(shape.drawn(sample, stage.learns, 0))
    return StageEstimate(weights, activations_of(shape, source, stage.learns), flops)
