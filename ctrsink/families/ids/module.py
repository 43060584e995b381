"""What the modules of families without text share: the loss of clicks, groups, pairs of a target and what it sees."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from ctrsink.config.stages import Objective
from ctrsink.families.ids.embedding import SignalTables
from ctrsink.families.protocol import CTRModule, Out
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.behaviours import BEHAVIOURS


class IdsModule(CTRModule):
    """A module that gives logits of targets; what it embeds events with is its `embedding`."""

    @abstractmethod
    def logits(self, batch: Batch, objective: Objective) -> torch.Tensor:
        """[T], without the base score."""

    def forward(self, batch: Batch, objective: Objective) -> Out:
        # In here and not around the call: DeepSpeed switches off whatever autocast surrounds it.
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.mixed_precision):
            found = self.logits(batch, objective)
        logits = found.float() + batch.inputs["base"]
        losses = functional.binary_cross_entropy_with_logits(logits, batch.targets.labels, reduction="none")
        return Out((losses * batch.targets.counted).sum(), logits)

    def decays(self, name: str, dimensions: int) -> bool:
        # A row that no batch has touched stays what it is.
        return super().decays(name, dimensions) and ".ids." not in name and ".tables." not in name

    def group_of(self, name: str) -> str:
        if ".ids." in name:
            return "ids"
        return "embedding" if name.startswith("embedding.") else "model"


def settled(model: CTRModule) -> CTRModule:
    """The model of an exported section: its tables come settled with the weights."""
    for part in model.modules():
        if isinstance(part, SignalTables):
            part.initial = nn.Module()
    return model


def seeded(make: Callable[[], CTRModule], seed: int, precision: str) -> CTRModule:
    """The module that `make` makes, every random weight of it from `seed`; weights are fp32, products as in `precision`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    model.mixed_precision = precision == "bf16"
    return model


class Head(nn.Sequential):
    """Layers to a logit, in fp32 at least: autocast would round it to bfloat16's three digits, and make ties of scores."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(torch.promote_types(input.dtype, torch.float32)))


def mlp(inputs: int, layers: Sequence[int], dropout: float) -> nn.Sequential:
    """Linear layers with GELU and dropout between them, to one number."""
    parts: list[nn.Module] = []
    for width in layers:
        parts += [nn.Linear(inputs, width), nn.GELU(), nn.Dropout(dropout)]
        inputs = width
    return nn.Sequential(*parts, nn.Linear(inputs, 1))


def seen_pairs(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Each target with each behaviour that it sees: rows of targets and of behaviours, int64 [P] each, target by target."""
    seen, of = batch.inputs["seen"], batch.axes["targets"].owner
    count = batch.costs["pairs"]
    target = torch.arange(len(seen), device=seen.device).repeat_interleave(seen, output_size=count)
    first = seen.cumsum(0) - seen
    place = torch.arange(count, device=seen.device) - first[target]
    return target, batch.axes[BEHAVIOURS].offsets[of[target]] + place


def linear_flops(module: nn.Module) -> int:
    """FLOPs of one row through all linear layers of a module, forward; a multiply-add counts as two."""
    shapes = (getattr(of.weight, "ds_shape", of.weight.shape) for of in module.modules() if isinstance(of, nn.Linear))
    return sum(2 * shape.numel() for shape in shapes)
