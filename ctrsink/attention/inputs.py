"""What the attention of one forward pass is given beside queries, keys and values."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ctrsink.attention.packing import Packing


@dataclass
class AttentionInputs:
    """What the attention of one forward pass has to know; it travels as a keyword through the backbone.

    Those of each backend add what that backend reads.
    """

    packing: Packing
    sink_valid: torch.Tensor
    """bool [B, K]."""
    packed_sinks: torch.Tensor
    """int64 [B, K]; where the sinks lie in the packed row."""
    window: int | None
    tables: dict[int, torch.Tensor] = field(default_factory=dict)
    """Inter-sink bias [B, K, K] by layer, from the layer's hook to its attention."""
    at_asked: dict[int, torch.Tensor] = field(default_factory=dict)
    """Bias [B, H, M, K] by layer, of those asked at the sinks: temporal, by similarity, or their sum."""
    followed: set[int] = field(default_factory=set)
    """Layers whose attention has computed by these inputs."""
    watch: "Watch | None" = None


Watch = Callable[[AttentionInputs, int, torch.Tensor, torch.Tensor, float], None]
"""Called in every layer with its number, packed query [1, H, N, d] and key [1, H_kv, N, d], and the factor of their product."""


def layer_index(module: nn.Module) -> int:
    """The number of the layer whose self-attention `module` is."""
    index = module.layer_idx
    assert isinstance(index, int)
    return index
