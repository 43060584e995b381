"""Attention by chunks with torch's scaled dot product attention: the means of a sequence are keys behind its own.

For exported and restored models and for GPUs, and what the blocks are tested by. It needs a mask [B, 1, L, C] and computes what
that hides: time and memory grow with the square of the history.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ctrsink.attention.chunked import Chunked, ChunkedInputs
from ctrsink.attention.chunked_dense import Columns
from ctrsink.attention.inputs import register
from ctrsink.attention.packed import Packed, Padded

BACKEND = "ctrsink_chunked_sdpa"
_MORE = 8  # dimensions, of which one is used: kernels want a multiple of it


@dataclass(kw_only=True)
class ChunkedSdpaInputs(ChunkedInputs):
    """The mask of a batch, made once per forward pass."""

    padded: Padded
    columns: Columns


def inputs(packed: Packed, chunked: Chunked) -> ChunkedSdpaInputs:
    """The inputs of a batch, with the rule of `ctrsink.attention.chunked`."""
    padded = Padded.of(packed)
    return ChunkedSdpaInputs(packed=packed, window=None, chunked=chunked, padded=padded, columns=Columns.painted(chunked, padded))


def _attend(
    given: ChunkedSdpaInputs,
    layer: int,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """See inputs.register."""
    columns, axis, width = given.columns, given.packed.sequences, value.shape[3]
    query = axis.pad(query[0].transpose(0, 1), columns.length).transpose(1, 2)
    key, value = (columns.padded(of[0].transpose(0, 1)) for of in (key, value))
    if (at_means := given.at_means.get(layer)) is not None:
        # A dimension more: no mask of each head.
        scaled = (at_means / kwargs["scaling"]).to(query.dtype)[:, None, None]
        query = _wider(query, scaled.expand(*query.shape[:3], 1))
        key = _wider(key, columns.means().to(key.dtype)[:, None].expand(*key.shape[:3], 1))
        value = functional.pad(value, (0, _MORE))
    out, _ = sdpa_attention_forward(module, query, key, value, columns.visible[:, None], **kwargs)
    if (at_asked := given.at_asked.get(layer)) is not None:
        # The few rows that have a bias of their own once more, in their place.
        index, mask = given.padded.asked, _masked(given, at_asked, query.dtype)
        rows = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        again, _ = sdpa_attention_forward(module, rows, key, value, mask, **kwargs)
        out = out.scatter(1, index[:, :, None, None].expand_as(again), again.to(out.dtype))
    return axis.pack(out[..., :width])[None]


def _wider(of: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """[..., d] and [..., 1] -> [..., d + _MORE]."""
    return functional.pad(torch.cat([of, by], -1), (0, _MORE - 1))


def _masked(given: ChunkedSdpaInputs, at_asked: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bias [B, H, M, K] of those asked at the columns of sinks, and what they see, as one float mask [B, H, M, C]."""
    visible, padded = given.columns.visible, given.padded
    seen = visible.gather(1, padded.asked[:, :, None].expand(-1, -1, visible.shape[2]))
    # Slots that are not valid share the padding column; adding 0 there changes nothing.
    at_asked = at_asked.masked_fill(~padded.sink_valid[:, None, None, :], 0.0)
    bias = torch.zeros(*at_asked.shape[:3], visible.shape[2], dtype=at_asked.dtype, device=at_asked.device)
    bias = bias.scatter_add(3, padded.sinks[:, None, None, :].expand_as(at_asked), at_asked)
    return bias.masked_fill(~seen[:, None], float("-inf")).to(dtype)


register(BACKEND, ChunkedSdpaInputs, _attend, drops=True)
