"""Inter-sink attention: a learned addition to the attention logits between sinks (CTR-Sink, arXiv 2508.03668)."""

from functools import partial
from typing import Any

import torch
from torch import nn

from ctrsink.attention.inputs import AttentionInputs, layer_index
from ctrsink.attention.kept import KeptInputs


class InterSinkBias(nn.Module):
    """`gamma * mean_h softmax(LN(X) W_q^h (LN(X) W_k^h)^T / sqrt(d_h))` over the K sinks of a sequence.

    X holds the hidden states of the sinks as they enter a layer's attention. The table stays compact, [B, K, K]: it is the same
    for all heads of the attention it is added to.

    Args:
        hidden_size: D, divisible by `heads`.
        heads: heads of this module; the backbone's number in the published code.
        gamma: start of the learned scale.
        causal: each row's softmax runs over valid sinks that are not later. False is the published form, in which every slot of
            the row takes part, padded ones too.
    """

    def __init__(self, hidden_size: int, heads: int, gamma: float = 1.0, causal: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm = nn.LayerNorm(hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        # One element, not zero dimensions: a captured 0-D tensor has no backward in FlexAttention.
        self.gamma = nn.Parameter(torch.full((1,), gamma))

    def forward(self, sinks: torch.Tensor, valid: torch.Tensor, window: int | None = None) -> torch.Tensor:
        """States [B, K, D] and validity bool [B, K] -> bias [B, K, K], 0 wherever a slot is not valid.

        With a `window` a row's softmax runs over that many earlier sinks at most: what the attention sees of them.
        """
        k = sinks.shape[1]
        query, key = self._projected(sinks)
        pairs = valid[:, :, None] & valid[:, None, :]
        allowed = None
        if self.causal:
            allowed = pairs.tril() if window is None else pairs.tril().triu(-window)
            # A row without a valid sink keeps itself: its softmax stays finite and is cleared below.
            allowed = allowed | torch.eye(k, dtype=torch.bool, device=valid.device)
        return self._table(query, key, allowed, pairs)

    def continued(self, sinks: torch.Tensor, kept: torch.Tensor | None, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """States [k, D] of the last k of K sinks, and the keys of those before, [heads, K - k, d] -> bias [k, K], all keys.

        With causal order alone: a row knows nothing of later sinks.
        """
        query, key = (of[0] for of in self._projected(sinks[None]))
        if kept is not None:
            key = torch.cat([kept, key], 1)
        rows = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=sinks.device)
        first = key.shape[1] - query.shape[1]
        allowed = rows.tril(first) if window is None else rows.tril(first).triu(first - window)
        return self._table(query[None], key[None], allowed[None], allowed[None])[0], key

    def _projected(self, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, K, D] -> queries and keys, [B, heads, K, d]."""
        b, k, d = sinks.shape
        x = self.norm(sinks)
        query, key = (of(x).view(b, k, self.heads, d // self.heads).transpose(1, 2) for of in (self.query, self.key))
        return query, key

    def _table(self, query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None, pairs: torch.Tensor) -> torch.Tensor:
        """The scaled mean over heads, [B, k, K], of a softmax over what is `allowed`, 0 but at the `pairs`; bool [B, k, K]."""
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None], float("-inf"))
        # At least fp32, whatever the weights and the products are in.
        table = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).mean(1)
        return self.gamma.to(table.dtype) * table.masked_fill(~pairs, 0.0)


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
    given: AttentionInputs | None = kwargs.get("attention_inputs")
    if given is None:  # the layer above drops keywords: CTRModel finds that the inputs were not followed
        return
    sinks, hidden = given.packed.sinks, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if isinstance(given, KeptInputs):
        layer = layer_index(module)
        for of in given.histories:
            kept = of.past.sink_keys[layer] if of.past.sink_keys else None
            of.tables[layer], keys = bias.continued(hidden[0, of.rows][of.new_sinks], kept, given.window)
            of.sink_keys.append(keys)
        return
    # Slots that are not valid point anywhere: without causal order they take part, but must not bring in other sequences.
    states = hidden[0][sinks.padded].masked_fill(~sinks.valid[..., None], 0.0)
    given.tables[layer_index(module)] = bias(states, sinks.valid, given.window)
