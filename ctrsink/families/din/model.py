"""The network of DIN (arXiv 1706.06978, section 4.3): interest is a sum of behaviours, each weighed for the target."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from ctrsink.config.model.din import DinSpec
from ctrsink.config.stages import Objective
from ctrsink.families.ids.embedding import EventEmbedding
from ctrsink.families.ids.module import Head, IdsModule, linear_flops, mlp, seen_pairs
from ctrsink.families.protocol import Flops
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.behaviours import BEHAVIOURS


class Weights(nn.Module):
    """One number for each pair of a target a and a behaviour b, by a network on `[a, b, a * b, a - b]`.

    Its first layer is a sum of maps of a, of b and of their product, a - b among them: only the last is computed for each pair.
    """

    def __init__(self, width: int, layers: tuple[int, ...]) -> None:
        super().__init__()
        first, *inner = layers
        self.target, self.behaviour = nn.Linear(width, first), nn.Linear(width, first, bias=False)
        self.product = nn.Linear(width, first, bias=False)
        self.inner = mlp(first, inner, 0.0)

    def forward(
        self, targets: torch.Tensor, behaviours: torch.Tensor, target: torch.Tensor, behaviour: torch.Tensor
    ) -> torch.Tensor:
        """Vectors [T, D] and [K, D]; rows of both for each pair, int64 [P] each -> [P, 1]."""
        apart = self.target(targets)[target] + self.behaviour(behaviours)[behaviour]
        return self.inner(functional.gelu(apart + self.product(targets[target] * behaviours[behaviour])))


class Din(IdsModule):
    """Logits of targets from `[interest, target, interest * target, numbers]`.

    The weights of behaviours are no shares of 1 (section 4.3): interest says how much of it there is. They are divided by the
    square root of the number of behaviours, by our own decision, or long histories would drown the rest.
    """

    def __init__(self, spec: DinSpec) -> None:
        super().__init__()
        self.embedding = EventEmbedding(spec, spec.width)
        self.weigh = Weights(spec.width, spec.attention_layers)
        self.head = Head(mlp(3 * spec.width + self.embedding.target_count, spec.layers, spec.dropout))

    def logits(self, batch: Batch, objective: Objective) -> torch.Tensor:
        inputs = batch.inputs
        behaviours = self.embedding.behaviours(inputs["signals"], inputs["numbers"])
        asked = self.embedding.targets(inputs["target_signals"], inputs["target_numbers"])
        target, behaviour = seen_pairs(batch)
        weights = self.weigh(asked, behaviours, target, behaviour)
        wide = torch.promote_types(asked.dtype, torch.float32)  # long sums do not fit bfloat16
        interest = torch.zeros_like(asked, dtype=wide).index_add(0, target, weights.to(wide) * behaviours[behaviour])
        interest = interest / inputs["seen"].clamp(min=1).sqrt()[:, None]
        return self.head(torch.cat([interest, asked, interest * asked, inputs["target_numbers"]], -1)).squeeze(-1)

    def flop_count(self, objective: Objective) -> Callable[[Batch], Flops]:
        of_event, of_target = linear_flops(self.embedding), linear_flops(self.head)
        of_pair = linear_flops(self.weigh.product) + linear_flops(self.weigh.inner)
        of_side = linear_flops(self.weigh.behaviour)

        def count(batch: Batch) -> Flops:
            behaviours, targets = batch.axes[BEHAVIOURS].total, batch.axes["targets"].total
            matrices = (behaviours + targets) * (of_event // 2 + of_side) + targets * of_target
            return Flops(3 * matrices, 3 * of_pair * batch.costs["pairs"])

        return count
