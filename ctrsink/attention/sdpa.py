"""Attention with sinks: plain causal attention for all rows, then the few rows that differ once more, in their place.

An inter-sink bias changes the rows of sinks only, a temporal or similarity bias those of events that are asked, and only targets
see less than all before them. So a dense [L, L] bias is never made: the price is the share of those rows of one attention.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ctrsink.attention.inputs import AttentionInputs, layer_index
from ctrsink.attention.packing import Packing
from ctrsink.attention.rule_dense import Rows, sink_rows, target_rows, windowed
from ctrsink.sequences.batch import Batch

BACKEND = "ctrsink_sdpa"


@dataclass(kw_only=True)
class SdpaInputs(AttentionInputs):
    """The few rows that torch's scaled dot product attention computes again, and their masks."""

    sinks: Rows
    targets: Rows | None
    """Rows of targets that see less than all before them or have a bias of their own; None: there are none."""
    base: torch.Tensor | None
    """bool [B, 1, L, L], what all rows see; None: everything up to themselves, the fastest kernel."""
    asked: tuple[torch.Tensor, torch.Tensor] | None
    """Of each row of targets, [B, R]: which of those asked it is (int64), and whether it is one (bool); None: no bias."""


def inputs(batch: Batch, sinks_only: bool, window: int | None = None, asked: bool = False) -> SdpaInputs:
    """The inputs of a batch; `asked`: their rows get a bias of their own."""
    packing = Packing.of(batch)
    base = windowed(batch, window)
    targets = target_rows(batch, sinks_only, window, asked)
    of_asked = None
    if asked and targets is not None:
        match = (targets.positions[:, :, None] == batch.asked_positions[:, None, :]) & batch.asked_valid[:, None, :]
        of_asked = match.to(torch.uint8).argmax(-1), match.any(-1)
    return SdpaInputs(
        packing=packing,
        sinks=sink_rows(batch, window),
        sink_valid=batch.sink_valid,
        packed_sinks=packing.find(batch.sink_positions),
        targets=targets,
        asked=of_asked,
        base=None if base is None else base[:, None],
        window=window,
    )


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    attention_inputs: AttentionInputs | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Packed query [1, H, N, d], key and value [1, H_kv, N, d] -> output [1, N, H, d]."""
    given = attention_inputs
    if not isinstance(given, SdpaInputs):  # a layer that drops keywords: CTRModel finds that it did not follow the inputs
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0], None
    given.followed.add(layer_index(module))
    if given.watch is not None:
        given.watch(given, layer_index(module), query, key, kwargs["scaling"])
    query, key, value = (given.packing.unpack(x[0].transpose(0, 1)).transpose(1, 2) for x in (query, key, value))
    out, _ = sdpa_attention_forward(module, query, key, value, given.base, **kwargs)
    special = _special(given, layer_index(module), key.shape[2], query.dtype)
    if special is not None:
        index, mask = special
        rows = index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        again, _ = sdpa_attention_forward(module, query.gather(2, rows), key, value, mask, **kwargs)
        out = out.scatter(1, index[:, :, None, None].expand_as(again), again.to(out.dtype))
    return given.packing.pack(out)[None], None


def _special(given: SdpaInputs, layer: int, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Positions [B, R] of the rows to compute again in this layer and their mask, a float [B, 1 or H, R, L]."""
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    if (table := given.tables.pop(layer, None)) is not None:
        parts.append((given.sinks.positions, _masked(given, given.sinks, table[:, None], length, dtype)))
    if given.targets is not None:
        at_sinks = None
        if (at_asked := given.at_asked.get(layer)) is not None:
            assert given.asked is not None  # by `inputs`
            which, one = (of[:, None, :, None] for of in given.asked)
            at_sinks = at_asked.gather(2, which.expand(-1, at_asked.shape[1], -1, at_asked.shape[3])) * one
        parts.append((given.targets.positions, _masked(given, given.targets, at_sinks, length, dtype)))
    if not parts:
        return None
    heads = max(mask.shape[1] for _, mask in parts)
    return torch.cat([index for index, _ in parts], 1), torch.cat([mask.expand(-1, heads, -1, -1) for _, mask in parts], 2)


def _masked(given: SdpaInputs, rows: Rows, at_sinks: torch.Tensor | None, length: int, dtype: torch.dtype) -> torch.Tensor:
    """A bias at the columns of sinks, [B, h, R, K] or none, and what the rows see, as one float mask [B, h, R, L]."""
    hidden = ~rows.visible[:, None]
    if at_sinks is None:
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, float("-inf"))
    # Slots that are not valid share the padding column; their entries are 0, so adding leaves it 0.
    at_sinks = at_sinks.masked_fill(~given.sink_valid[:, None, None, :], 0.0)
    columns = given.sinks.positions[:, None, None, :].expand_as(at_sinks)
    bias = torch.zeros(*at_sinks.shape[:3], length, dtype=at_sinks.dtype, device=at_sinks.device)
    return bias.scatter_add(3, columns, at_sinks).masked_fill(hidden, float("-inf")).to(dtype)


AttentionInterface.register(BACKEND, _attention)
