"""How much of the attention that targets pay to their history goes to sinks: computed beside a forward pass, exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ctrsink.attention.inputs import AttentionInputs
from ctrsink.attention.rule_dense import visible
from ctrsink.config.stages import ReadoutSpec
from ctrsink.sequences.batch import PAD, PREFIX, SINK, Batch

if TYPE_CHECKING:
    from ctrsink.families.decoder.model import CTRModel


@contextmanager
def watched(model: "CTRModel", batch: Batch, readout: ReadoutSpec) -> Iterator["SinkShare"]:
    """Watches the forward pass of `batch` that is made meanwhile."""
    share = model.watch = SinkShare(batch, readout.through_sinks, model.window)
    try:
        yield share
    finally:
        model.watch = None


@dataclass
class SinkShare:
    """Watches one forward pass of `batch`, by `CTRModel.watch`; no training step does.

    The softmax of the rows of events that are asked is computed in fp32 over all that they see, with their bias; these rows have
    no inter-sink bias. The history is what they see of other events; prefix and own text are left out.

    Args:
        batch: on the model's device.
        sinks_only: as in `ctrsink.attention.rule_dense.visible`.
        window: the model's.
    """

    batch: Batch
    sinks_only: bool
    window: int | None
    heads: dict[int, list[float]] = field(default_factory=dict)
    """By layer, of each head; a layer is absent where no target sees any history."""
    paid: torch.Tensor | None = None
    """float32 [B, M, K]; attention of each event asked to each sink, mean over heads, summed over layers."""

    @property
    def layers(self) -> dict[int, float]:
        """By layer, the mean over heads."""
        return {layer: sum(shares) / len(shares) for layer, shares in self.heads.items()}

    def __call__(self, plan: AttentionInputs, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Packed query [1, H, N, d] and key [1, H_kv, N, d] of one layer."""
        batch, at = self.batch, self.batch.asked_positions
        query, key = (plan.packing.unpack(x[0].transpose(0, 1)).transpose(1, 2).float() for x in (query, key))
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        rows = query.gather(2, at[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        with torch.autocast(query.device.type, enabled=False):
            scores = rows @ key.transpose(2, 3) * scaling
        if (bias := plan.at_asked.get(layer)) is not None:
            # Slots that are not valid share the padding column; adding 0 there changes nothing.
            bias = bias.float().masked_fill(~batch.sink_valid[:, None, None, :], 0.0)
            scores = scores.scatter_add(3, batch.sink_positions[:, None, None, :].expand_as(bias), bias)
        seen = visible(batch, at, self.sinks_only, self.window)
        weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
        event = batch.event_ids[:, None, :]
        kept = (batch.kinds != PAD) & (batch.kinds != PREFIX)
        history = kept[:, None] & (event != batch.event_ids.gather(1, at)[:, :, None]) & batch.asked_valid[:, :, None]
        paid = weights * history[:, None]
        total = paid.sum((0, 2, 3))
        if bool((total > 0).all()):
            self.heads[layer] = (paid * (batch.kinds == SINK)[:, None, None]).sum((0, 2, 3)).div(total).tolist()
        columns = batch.sink_positions[:, None, :].expand(-1, paid.shape[2], -1)
        at_sinks = paid.mean(1).gather(2, columns) * batch.sink_valid[:, None, :]
        self.paid = at_sinks if self.paid is None else self.paid + at_sinks
