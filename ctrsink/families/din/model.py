"""The network of DIN (arXiv 1706.06978, section 4.3): interest is a sum of behaviours, each weighed for the target."""

from collections.abc import Callable

import torch

from ctrsink.config.model.din import DinSpec
from ctrsink.config.stages import Objective
from ctrsink.families.facts import Facts
from ctrsink.families.ids.embedding import EventEmbedding
from ctrsink.families.ids.module import IdsModule, linear_flops, mlp, seen_pairs
from ctrsink.families.protocol import Flops
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.behaviours import BEHAVIOURS


class Din(IdsModule):
    """Logits of targets from `[interest, target, interest * target, numbers]`.

    The weights of behaviours are no shares of 1 (section 4.3): interest says how much of it there is. They are divided by the
    square root of the number of behaviours, or long histories would drown the rest.
    """

    def __init__(self, spec: DinSpec, facts: Facts) -> None:
        super().__init__()
        self.embedding = EventEmbedding(spec, facts, spec.width)
        self.weigh = mlp(4 * spec.width, spec.attention_layers, 0.0)
        self.head = mlp(3 * spec.width + self.embedding.target_count, spec.layers, spec.dropout)

    def logits(self, batch: Batch, objective: Objective) -> torch.Tensor:
        inputs = batch.inputs
        behaviours = self.embedding.behaviours(inputs["signals"], inputs["numbers"])
        asked = self.embedding.targets(inputs["target_signals"], inputs["target_numbers"])
        target, behaviour = seen_pairs(batch)
        one, other = asked[target], behaviours[behaviour]
        weights = self.weigh(torch.cat([one, other, one * other, one - other], -1))
        interest = torch.zeros_like(asked).index_add(0, target, (weights * other).to(asked.dtype))
        interest = interest / inputs["seen"].clamp(min=1).sqrt()[:, None]
        return self.head(torch.cat([interest, asked, interest * asked, inputs["target_numbers"]], -1)).squeeze(-1)

    def flop_count(self, objective: Objective) -> Callable[[Batch], Flops]:
        of_event, of_pair, of_target = (linear_flops(part) for part in (self.embedding, self.weigh, self.head))

        def count(batch: Batch) -> Flops:
            events = batch.axes[BEHAVIOURS].total * of_event // 2 + batch.axes["targets"].total * (of_event // 2 + of_target)
            return Flops(3 * events, 3 * of_pair * batch.costs["pairs"])

        return count
