"""Attention with an inter-sink bias: plain attention for all rows, then the few rows of sinks once more with their bias.

The bias changes the rows of sinks only, so a dense [L, L] bias is never made: the price is K/L of one attention.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ctrsink.batch import PREFIX, SINK, Batch
from ctrsink.model.bias import InterSinkBias

BACKEND = "ctrsink_sdpa"


@dataclass
class SinkRows:
    """What the attention of one forward pass has to know of the sinks; it travels as a keyword through the backbone."""

    positions: torch.Tensor
    """int64 [B, K]; slots that are not valid point at the row's last position, which is padding."""
    valid: torch.Tensor
    """bool [B, K]."""
    visible: torch.Tensor
    """bool [B, 1, K, L]; what the rows of sinks may attend to."""
    tables: dict[int, torch.Tensor] = field(default_factory=dict)
    """Bias [B, K, K] by layer, from the layer's hook to its attention."""
    applied: set[int] = field(default_factory=set)
    """Layers whose bias has been added."""


def visibility(batch: Batch, sinks_only: bool) -> torch.Tensor | None:
    """Which position may attend to which, bool [B, 1, L, L]; None means plain causal, the fastest kernel.

    With `sinks_only` (readout over sinks, form attend) an aligned position sees the prefix, its own event and, of other events,
    the sinks (CTR-Sink, arXiv 2508.03668, two-stage training). Padding comes after everything else, so causality hides it.
    """
    if not sinks_only:
        return None
    event, kind = batch.event_ids, batch.kinds
    same_event = event[:, :, None] == event[:, None, :]
    through = ((kind == SINK) | (kind == PREFIX))[:, None, :]
    allowed = same_event | through | ~batch.aligned[:, :, None]
    return allowed.tril()[:, None]


def sink_rows(batch: Batch) -> SinkRows:
    """The rows of sinks and what they see: everything up to themselves, whatever the readout."""
    columns = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    visible = columns[None, None, :] <= batch.sink_positions[:, :, None]
    return SinkRows(batch.sink_positions, batch.sink_valid, visible[:, None])


def attach(layers: list[nn.Module], biases: nn.ModuleList) -> None:
    """Let `biases[i]` compute its table from what enters the self-attention of `layers[i]`.

    A pre-forward hook: no forward of the backbone is replaced, and gradient checkpointing computes the table again.
    """
    for layer, bias in zip(layers, biases, strict=False):
        attention = layer.self_attn
        assert isinstance(attention, nn.Module) and isinstance(bias, InterSinkBias)
        # A partial, not a closure: a deep copy of the model then computes with its own biases.
        attention.register_forward_pre_hook(partial(_compute_table, bias), with_kwargs=True)


def _compute_table(bias: InterSinkBias, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    rows: SinkRows | None = kwargs.get("sink_rows")
    if rows is None:  # the layer above drops keywords: CTRModel finds the bias missing
        return
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    index = rows.positions[:, :, None].expand(-1, -1, hidden.shape[-1])
    rows.tables[_layer(module)] = bias(hidden.gather(1, index), rows.valid)


def _layer(module: nn.Module) -> int:
    index = module.layer_idx
    assert isinstance(index, int)
    return index


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sink_rows: SinkRows | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Query [B, H, L, d], key and value [B, H_kv, L, d] -> output [B, L, H, d]."""
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if sink_rows is None or (table := sink_rows.tables.pop(_layer(module), None)) is None:
        return out, None
    index = sink_rows.positions
    b, k = index.shape
    bias = torch.zeros(b, k, key.shape[2], dtype=table.dtype, device=table.device)
    # Slots that are not valid share the padding column; their entries are 0, so adding leaves it 0.
    bias = bias.scatter_add(2, index[:, None, :].expand(b, k, k), table)
    mask = bias[:, None].masked_fill(~sink_rows.visible, float("-inf")).to(query.dtype)
    rows = index[:, None, :, None].expand(b, query.shape[1], k, query.shape[3])
    biased, _ = sdpa_attention_forward(module, query.gather(2, rows), key, value, mask, **kwargs)
    sink_rows.applied.add(_layer(module))
    return out.scatter(1, index[:, :, None, None].expand_as(biased), biased), None


AttentionInterface.register(BACKEND, _attention)
