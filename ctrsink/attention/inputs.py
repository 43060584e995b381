"""What the attention of one forward pass is given beside queries, keys and values."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ctrsink.attention.packed import Packed


@dataclass
class AttentionInputs:
    """What the attention of one forward pass has to know; it travels as a keyword through the backbone.

    Those of each backend add what that backend reads.
    """

    packed: Packed
    window: int | None
    tables: dict[int, torch.Tensor] = field(default_factory=dict)
    """Inter-sink bias [B, K, K] by layer, from the layer's hook to its attention."""
    at_asked: dict[int, torch.Tensor] = field(default_factory=dict)
    """Bias [B, H, M, K] by layer, of those asked at the sinks: temporal, by similarity, or their sum."""
    followed: set[int] = field(default_factory=set)
    """Layers whose attention has computed by these inputs."""
    watch: "Watch | None" = None

    @property
    def length(self) -> int:
        """Rows that the backbone computes: the N positions, and behind them what a backend wants more, which no position sees."""
        return self.packed.sequences.total


Watch = Callable[[AttentionInputs, int, torch.Tensor, torch.Tensor, float], None]
"""Called in every layer with its number, packed query [1, H, N, d] and key [1, H_kv, N, d], and the factor of their product."""


@dataclass
class OwnAttention(AttentionInputs, ABC):
    """Inputs that compute attention themselves, whatever the backend."""

    @abstractmethod
    def attend(
        self, layer: int, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """See `register`."""


I = TypeVar("I", bound=AttentionInputs)  # noqa: E741


def layer_index(module: nn.Module) -> int:
    """The number of the layer whose self-attention `module` is."""
    index = module.layer_idx
    assert isinstance(index, int)
    return index


def register(name: str, kind: type[I], attend: Callable[..., torch.Tensor], drops: bool = False) -> None:
    """Make `attend` the backend that transformers knows as `name`.

    Args:
        kind: the inputs that it reads.
        attend: (inputs, layer, module, query [1, H, L, d], key and value [1, H_kv, L, d], keywords) -> output [1, L, H, d], of
            the L rows that the backbone computes: `length` of the inputs.
        drops: whether it has dropout of attention weights; where it has none, a layer that asks for it gets ValueError.
    """

    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attention_inputs: AttentionInputs | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if isinstance(attention_inputs, OwnAttention):
            layer = layer_index(module)
            attention_inputs.followed.add(layer)
            return attention_inputs.attend(layer, module, query, key, value, **kwargs), None
        if not isinstance(attention_inputs, kind):  # a layer that drops keywords: the model finds that it was not followed
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0], None
        if kwargs.get("dropout") and not drops:
            raise ValueError(f"{name} has no dropout of attention weights: set attention_dropout to 0")
        layer = layer_index(module)
        attention_inputs.followed.add(layer)
        if attention_inputs.watch is not None:
            positions = slice(attention_inputs.packed.sequences.total)
            attention_inputs.watch(attention_inputs, layer, query[:, :, positions], key[:, :, positions], kwargs["scaling"])
        return attend(attention_inputs, layer, module, query, key, value, **kwargs), None

    AttentionInterface.register(name, forward)
