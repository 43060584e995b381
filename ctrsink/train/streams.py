"""The stream of a stage, as a run and a dry run of it have it."""

from ctrsink.config import RunSpec
from ctrsink.config.stages import StageSpec
from ctrsink.families.facts import Facts
from ctrsink.stream.price import PLAIN
from ctrsink.stream.stream import SequenceSource, TrainStream
from ctrsink.train.balance import price_of
from ctrsink.train.capacity import fitting
from ctrsink.train.engine import Engine


def stream_of(
    spec: RunSpec, stage: StageSpec, engine: Engine, source: SequenceSource, facts: Facts, precision: str
) -> TrainStream:
    """From its beginning; collective where `train.micro_batch_tokens` is `auto`.

    Args:
        engine: of the stage.
        precision: of the run, see Family.build.
    """
    topology, data, tokens = engine.topology, spec.data, spec.train.micro_batch_tokens
    return TrainStream(
        source,
        spec.seed,
        data.shuffle_shards,
        spec.batch_size(stage),
        spec.accumulation(stage, topology.world),
        topology.rank,
        topology.world,
        data.order,
        data.workers,
        fitting(engine, spec, facts, precision, source, stage) if tokens == "auto" else tokens,
        price_of(engine.model, source, stage.learns) if topology.world > 1 else PLAIN,
        spec.train.zero_stage > 1,  # gradients travel in each micro-step, and under 3 weights too
    )
