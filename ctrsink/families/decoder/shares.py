"""How much of the attention that targets pay to their history goes to sinks: computed beside a forward pass, exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ctrsink.attention.chunked import ChunkedInputs
from ctrsink.attention.chunked_dense import Columns
from ctrsink.attention.inputs import AttentionInputs
from ctrsink.attention.kinds import PAD, PREFIX, SINK
from ctrsink.attention.packed import Packed, Padded
from ctrsink.attention.rule_dense import visible
from ctrsink.config.stages import Objective
from ctrsink.sequences.batch import Batch

if TYPE_CHECKING:
    from ctrsink.families.decoder.model import CTRModel


@contextmanager
def watched(model: "CTRModel", batch: Batch, objective: Objective) -> Iterator["SinkShare"]:
    """Watches the forward pass of `batch` that is made meanwhile."""
    share = model.watch = SinkShare(Padded.of(Packed.of(batch)), objective.readout.through_sinks, model.window)
    try:
        yield share
    finally:
        model.watch = None


@dataclass
class SinkShare:
    """Watches one forward pass, by `CTRModel.watch`; no training step does.

    The softmax of the rows of events that are asked is computed in fp32 over all that they see, with their bias; these rows have
    no inter-sink bias. The history is what they see of other events; prefix and own text are left out. What is paid to the mean
    of a chunk is paid to its sinks, in equal parts.

    Args:
        of: the batch, on the model's device.
        sinks_only: as in `ctrsink.attention.rule_dense.visible`.
        window: the model's.
    """

    of: Padded
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

    def __call__(self, given: AttentionInputs, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Packed query [1, H, N, d] and key [1, H_kv, N, d] of one layer."""
        of, at, axis = self.of, self.of.asked, given.packed.sequences
        query = axis.pad(query[0].transpose(0, 1), of.kinds.shape[1]).transpose(1, 2).float()
        rows = query.gather(2, at[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        with torch.autocast(query.device.type, enabled=False):
            if isinstance(given, ChunkedInputs):
                weights = self._by_chunks(given, layer, rows, key[0].transpose(0, 1), scaling)
            else:
                key = axis.pad(key[0].transpose(0, 1), of.kinds.shape[1]).transpose(1, 2)
                seen = visible(of, at, self.sinks_only, self.window)
                weights = self._weights(given, layer, rows, key, scaling, seen)
        event = of.events[:, None, :]
        kept = (of.kinds != PAD) & (of.kinds != PREFIX)
        history = kept[:, None] & (event != of.events.gather(1, at)[:, :, None]) & of.asked_valid[:, :, None]
        paid = weights * history[:, None]
        total = paid.sum((0, 2, 3))
        if bool((total > 0).all()):
            self.heads[layer] = (paid * (of.kinds == SINK)[:, None, None]).sum((0, 2, 3)).div(total).tolist()
        columns = of.sinks[:, None, :].expand(-1, paid.shape[2], -1)
        at_sinks = paid.mean(1).gather(2, columns) * of.sink_valid[:, None, :]
        self.paid = at_sinks if self.paid is None else self.paid + at_sinks

    def _weights(
        self, given: AttentionInputs, layer: int, rows: torch.Tensor, key: torch.Tensor, scaling: float, seen: torch.Tensor
    ) -> torch.Tensor:
        """Of queries [B, H, M, d] and keys [B, H_kv, C, d], of which those `seen`, [B, M, C], are: [B, H, M, C]."""
        scores = rows @ key.float().repeat_interleave(rows.shape[1] // key.shape[1], 1).transpose(2, 3) * scaling
        if (bias := given.at_asked.get(layer)) is not None:
            # Slots that are not valid share the padding column; adding 0 there changes nothing.
            bias = bias.float().masked_fill(~self.of.sink_valid[:, None, None, :], 0.0)
            scores = scores.scatter_add(3, self.of.sinks[:, None, None, :].expand_as(bias), bias)
        if isinstance(given, ChunkedInputs) and (at_means := given.at_means.get(layer)) is not None:
            scores[..., self.of.kinds.shape[1] :] += at_means.float()[:, None, None]
        return scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)

    def _by_chunks(self, given: ChunkedInputs, layer: int, rows: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention to positions, [B, H, M, L], of queries [B, H, M, d] and packed keys [N, H_kv, d]."""
        columns = Columns.painted(given.chunked, self.of)
        seen = columns.visible.gather(1, self.of.asked[:, :, None].expand(-1, -1, columns.visible.shape[2]))
        return columns.at_positions(self._weights(given, layer, rows, columns.padded(key), scaling, seen))
