"""A contestant that costs what the published code costs, written by ourselves: what its waste is worth on the same machine."""

from collections.abc import Callable
from typing import Any

from benchmarks.dense import DenseModel
from benchmarks.shapes import random_batch
from benchmarks.training import Trainee, Work, work_for
from ctrsink.config import RunSpec
from ctrsink.config.model import DecoderSpec
from ctrsink.families.facts import Facts
from ctrsink.families.parameters import set_trainable
from ctrsink.stream.stream import Step

IMPRESSIONS = 8
HISTORIES = 2  # of an impression: liked and disliked items, encoded apart
BEHAVIOURS, EVENT_TOKENS = 50, 9  # with a sink each and a target: 509 positions, as good as the published 512
AT_ONCE = 4  # sequences of a micro-batch: eager attention keeps several [4, 9, 512, 512] for each of 30 layers


class Published:
    """LoRA on the model of `spec` in fp32: eager attention, a dense [B, 1, L, L] bias in half of the layers, nothing shared.

    A step is one of 8 impressions, two sequences each. Tokens are random, their number is the published one.
    """

    def __init__(self, spec: RunSpec, facts: Facts) -> None:
        assert isinstance(spec.model, DecoderSpec)
        assert spec.model.bias is not None
        half = spec.model.bias.model_copy(update={"layers": 0.5})
        model = DenseModel.build(spec.model.model_copy(update={"bias": half, "attention": "sdpa"}), facts.vocabulary, spec.seed)
        backbone: Any = model.model.backbone
        backbone.set_attn_implementation("eager")
        set_trainable(model.model, spec.stages[-1].trainable)
        model.biases.requires_grad_(True)
        self.trainee = Trainee(model, spec.stages[-1].learns)
        parts = IMPRESSIONS * HISTORIES // AT_ONCE
        self.batches = [random_batch(AT_ONCE, BEHAVIOURS, EVENT_TOKENS, True, seed) for seed in range(parts)]

    def work(self, seconds: float, clock: Callable[[], float]) -> Work:
        """Steps for that long, one at least; of no time, to warm up, a part of one."""
        part = len(self.batches) if seconds else 1
        step = Step(self.batches[:part], IMPRESSIONS * part // len(self.batches), 0)
        return work_for(lambda taken: self.trainee.step(taken.micro_batches), iter(lambda: step, None), seconds, clock=clock)
