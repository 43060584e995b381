"""Attention with sinks: plain causal attention for all rows, then the few rows that differ once more, in their place.

An inter-sink bias changes the rows of sinks only, a temporal or similarity bias those of events that are asked, and only targets
see less than all before them. So a dense [L, L] bias is never made: the price is the share of those rows of one attention.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ctrsink.attention.inputs import AttentionInputs, register
from ctrsink.attention.packed import Packed, Padded
from ctrsink.attention.rule_dense import Rows, sink_rows, target_rows, windowed

BACKEND = "ctrsink_sdpa"


@dataclass(kw_only=True)
class SdpaInputs(AttentionInputs):
    """The few rows that torch's scaled dot product attention computes again, and their masks."""

    padded: Padded
    sinks: Rows
    targets: Rows | None
    """Rows of targets that see less than all before them or have a bias of their own; None: there are none."""
    base: torch.Tensor | None
    """bool [B, 1, L, L], what all rows see; None: everything up to themselves, the fastest kernel."""
    asked: tuple[torch.Tensor, torch.Tensor] | None
    """Of each row of targets, [B, R]: which of those asked it is (int64), and whether it is one (bool); None: no bias."""


def inputs(packed: Packed, sinks_only: bool, window: int | None = None, asked: bool = False) -> SdpaInputs:
    """The inputs of a batch; `asked`: their rows get a bias of their own."""
    padded = Padded.of(packed)
    base = windowed(padded, window)
    targets = target_rows(padded, sinks_only, window, asked)
    of_asked = None
    if asked and targets is not None:
        match = (targets.positions[:, :, None] == padded.asked[:, None, :]) & padded.asked_valid[:, None, :]
        of_asked = match.to(torch.uint8).argmax(-1), match.any(-1)
    return SdpaInputs(
        packed=packed,
        window=window,
        padded=padded,
        sinks=sink_rows(padded, window),
        targets=targets,
        asked=of_asked,
        base=None if base is None else base[:, None],
    )


def _attend(
    given: SdpaInputs, layer: int, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """See inputs.register."""
    axis, length = given.packed.sequences, given.padded.kinds.shape[1]
    query, key, value = (axis.pad(x[0].transpose(0, 1), length).transpose(1, 2) for x in (query, key, value))
    out, _ = sdpa_attention_forward(module, query, key, value, given.base, **kwargs)
    special = _special(given, layer, length, query.dtype)
    if special is not None:
        index, mask = special
        rows = index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        again, _ = sdpa_attention_forward(module, query.gather(2, rows), key, value, mask, **kwargs)
        out = out.scatter(1, index[:, :, None, None].expand_as(again), again.to(out.dtype))
    return axis.pack(out)[None]


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
    at_sinks = at_sinks.masked_fill(~given.padded.sink_valid[:, None, None, :], 0.0)
    columns = given.sinks.positions[:, None, None, :].expand_as(at_sinks)
    bias = torch.zeros(*at_sinks.shape[:3], length, dtype=at_sinks.dtype, device=at_sinks.device)
    return bias.scatter_add(3, columns, at_sinks).masked_fill(hidden, float("-inf")).to(dtype)


register(BACKEND, SdpaInputs, _attend, drops=True)
