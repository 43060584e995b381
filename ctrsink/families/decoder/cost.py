"""FLOPs that a training step needs, from the model's shapes and the batch's tokens; a multiply-add counts as two."""

from dataclasses import dataclass
from typing import Any

import torch

from ctrsink.attention.rule_dense import places
from ctrsink.families.decoder.groups import group_of
from ctrsink.families.decoder.model import CTRModel
from ctrsink.sequences.batch import PAD, PREFIX, SINK, Batch


@dataclass(frozen=True)
class Flops:
    """Of one training step."""

    matrices: int
    attention: int

    @property
    def total(self) -> int:
        return self.matrices + self.attention


@dataclass(frozen=True)
class FlopCount:
    """What a model needs per token and per visible pair of tokens, with what is trained now.

    Matrices: 2 per weight and token forward, 2 backward to the activations, and 2 to the weight's own gradient where it is
    trained: 4 N_frozen + 6 N_trained. Attention: forward two products (QK^T, PV) of 2 d per head and pair, backward four. Where
    nothing but the head is trained there is no way back: 2 N, and the two products. Embeddings, sinks, biases, norms, the head,
    and whatever is computed twice (checkpointed activations, the kernels' second QK^T), take time and count as nothing.
    """

    per_token: int
    per_pair: int
    window: int | None

    @classmethod
    def of(cls, model: CTRModel) -> "FlopCount":
        """Also of a model whose weights ZeRO-3 has split."""
        backbone: Any = model.backbone
        config = backbone.config.get_text_config()
        embedding = backbone.get_input_embeddings().weight
        # What targets are told is trained with the head, but lies below the backbone.
        returns = any(p.requires_grad and not name.startswith("head.") for name, p in model.named_parameters())
        weights = 0
        for name, parameter in model.named_parameters():
            # Under ZeRO-3 the parameter itself is empty; its shape is kept beside it.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if len(shape) == 2 and parameter is not embedding and group_of(name) in ("backbone", "lora"):
                weights += shape.numel() * (6 if parameter.requires_grad else 4 if returns else 2)
        width = config.num_attention_heads * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        return cls(weights, (12 if returns else 4) * width * config.num_hidden_layers, model.window)

    def step(self, batch: Batch, sinks_only: bool) -> Flops:
        """Of one micro-batch; `sinks_only` as in `ctrsink.attention.rule_dense.visible`."""
        return Flops(self.per_token * batch.tokens, self.per_pair * visible_pairs(batch, sinks_only, self.window))


def visible_pairs(batch: Batch, sinks_only: bool, window: int | None) -> int:
    """How many tokens all tokens see, the sum of `ctrsink.attention.rule_dense.visible`, counted without making it: O(B L)."""
    token = batch.kinds != PAD
    behind = torch.iinfo(torch.int32).max  # padding, so that events and places ascend
    event = batch.event_ids.masked_fill(~token, behind)
    columns = torch.arange(event.shape[1], device=event.device)
    own = torch.searchsorted(event, event)  # where the token's own event begins
    prefix = batch.kinds == PREFIX
    shown, through = _counts(token & ~batch.candidate), _counts(prefix | (batch.kinds == SINK))

    def before(index: torch.Tensor) -> torch.Tensor:
        """How many of the tokens before `index` [B, L] may be seen from other events."""
        every = shown.gather(1, index)
        return torch.where(batch.aligned, through.gather(1, index), every) if sinks_only else every

    seen = columns - own + 1 + before(own)
    if window is not None:
        place = places(batch).masked_fill(~token, behind)
        oldest = torch.searchsorted(place, place - window)
        seen -= torch.where(oldest > 0, before(oldest) - prefix.sum(1, keepdim=True), 0)
    return int(seen[token].sum())


def _counts(marked: torch.Tensor) -> torch.Tensor:
    """bool [B, L] -> how many are marked before each position and in all, int64 [B, L + 1]."""
    return torch.nn.functional.pad(marked.cumsum(1), (1, 0))
