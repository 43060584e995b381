"""Inter-sink attention in its textbook form: an additive float mask [B, 1, L, L] in every layer that carries the bias."""

from functools import partial
from typing import Any

import torch
from torch import nn

from ctrsink.attention.packed import Packed, Padded
from ctrsink.config.model import DecoderSpec
from ctrsink.config.stages import Objective
from ctrsink.families.decoder.bias import InterSinkBias
from ctrsink.families.decoder.build import build_model
from ctrsink.families.decoder.model import CTRModel, decoder_layers
from ctrsink.families.protocol import Out
from ctrsink.sequences.batch import Batch


class DenseModel(nn.Module):
    """The CTRModel of `spec` with the same parameters, whose bias is written into a dense mask; transformers' sdpa for all rows.

    What ours is measured against: it computes the same, for one sequence per row of the batch and a readout over all.

    Args:
        model: with its biases; it is taken apart, so it is of no use by itself afterwards.
    """

    def __init__(self, model: CTRModel) -> None:
        super().__init__()
        self.biases = model.biases
        layers = decoder_layers(model.backbone)
        for layer in layers:
            assert isinstance(layer.self_attn, nn.Module)
            layer.self_attn._forward_pre_hooks.clear()  # ours would compute its own bias beside
        model.biases = nn.ModuleList()
        backbone: Any = model.backbone
        backbone.set_attn_implementation("sdpa")
        # Padded rows, not one packed row: transformers' sdpa does not know where sequences end.
        model.hidden_states = self._hidden_states  # pyright: ignore[reportAttributeAccessIssue]
        self.model = model
        self._rows: Padded | None = None
        for layer, bias in zip(layers, self.biases, strict=False):
            assert isinstance(layer.self_attn, nn.Module) and isinstance(bias, InterSinkBias)
            layer.self_attn.register_forward_pre_hook(partial(self._add_mask, bias), with_kwargs=True)

    @classmethod
    def build(cls, spec: DecoderSpec, vocabulary: int, seed: int, precision: str = "fp32") -> "DenseModel":
        """See build_model."""
        return cls(build_model(spec, vocabulary, seed, precision))

    def forward(self, batch: Batch, objective: Objective) -> Out:
        """See CTRModel.forward."""
        return self.model(batch, objective)

    def _hidden_states(self, batch: Batch, packed: Packed, objective: Objective) -> torch.Tensor:
        self._rows = Padded.of(packed)
        length = self._rows.kinds.shape[1]
        embedded, places = (packed.sequences.pad(of, length) for of in (self.model.embed(batch), batch.inputs["position_ids"]))
        out = self.model.backbone(inputs_embeds=embedded, position_ids=places, use_cache=False)
        return packed.sequences.pack(out.last_hidden_state)

    def _add_mask(
        self, bias: InterSinkBias, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self._rows is not None
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return args, kwargs | {"attention_mask": dense_mask(bias, hidden, self._rows)}


def dense_mask(bias: InterSinkBias, hidden: torch.Tensor, rows: Padded) -> torch.Tensor:
    """States [B, L, D] before an attention -> what is added to its logits, [B, 1, L, L] in the states' precision."""
    index, (b, length, _) = rows.sinks, hidden.shape
    table = bias(hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[-1])), rows.sink_valid)
    cells = index[:, :, None] * length + index[:, None, :]
    mask = table.new_zeros(b, length * length).scatter_add(1, cells.flatten(1), table.flatten(1)).view(b, 1, length, length)
    later = torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
    return mask.masked_fill(later, float("-inf")).to(hidden.dtype)
