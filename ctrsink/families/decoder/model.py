"""CTRModel: a decoder backbone with sinks, inter-sink bias and a click head."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ctrsink.attention import blocks, flex, sdpa
from ctrsink.attention.inputs import Watch
from ctrsink.config.model import ModelSpec
from ctrsink.config.stages import ReadoutSpec
from ctrsink.errors import InputError
from ctrsink.families.decoder.bias import InterSinkBias, attach
from ctrsink.families.decoder.head import ClickHead, JointHead
from ctrsink.families.decoder.readout import read
from ctrsink.families.decoder.similarity import SimilarityBias
from ctrsink.families.decoder.temporal import TemporalBias
from ctrsink.families.embeddings import SignalEmbedding, Table, token_scale
from ctrsink.features.registry import SIGNALS, signal
from ctrsink.sequences.batch import Batch

BACKENDS = {"sdpa": sdpa.BACKEND, "blocks": blocks.BACKEND, "flex": flex.BACKEND}
"""Names under which transformers knows the attention of each `model.attention`."""


class CTRModel(nn.Module):
    """Click probabilities of the targets in a Batch (CTR-Sink, arXiv 2508.03668).

    Args:
        backbone: a decoder without its vocabulary head, whose attention implementation is `BACKENDS[spec.attention]`.
        spec: which sinks and bias it carries.
    """

    def __init__(self, backbone: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        config: Any = backbone.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.backbone = backbone
        self.mixed_precision = False
        """Matrix products in bfloat16 whatever the weights are held in."""
        self.head = ClickHead(hidden)
        self.sinks = self.target = None
        self.biases = nn.ModuleList()
        scale = token_scale(backbone)
        if spec.sinks is not None:
            of = spec.sinks
            told = [signal(name) for name in of.categories]
            tables = [Table(of.rows if found.hashed else of.buckets, found.identity) for found in told]
            self.sinks = SignalEmbedding(tables, of.embedding_size, len(of.numbers), hidden, scale, of.id_dropout)
        if spec.target is not None:
            of = spec.target
            values = max((SIGNALS[name].values or 0 for name in SIGNALS if "target" in SIGNALS[name].sides), default=0)
            told = [signal(name) for name in of.categories]
            tables = [Table(of.rows if found.hashed else values, found.identity) for found in told]
            self.target = SignalEmbedding(tables, of.embedding_size, len(of.numbers), hidden, scale, of.id_dropout)
            if of.numbers:
                self.head = JointHead(hidden, len(of.numbers), of.dropout)
        if spec.bias is not None:
            layers = decoder_layers(backbone)
            count = max(1, round(len(layers) * spec.bias.layers))
            self.biases.extend(InterSinkBias(hidden, heads, spec.bias.gamma, spec.bias.causal) for _ in range(count))
            attach(layers, self.biases)
        self.temporal = nn.ModuleList()
        if spec.temporal:
            self.temporal.extend(TemporalBias(heads) for _ in decoder_layers(backbone))
        self.similarity = nn.ModuleList()
        if spec.similarity is not None:
            self.similarity.extend(SimilarityBias(heads) for _ in decoder_layers(backbone))
        self.layers = len(decoder_layers(backbone))
        self.window = spec.window
        self.attention = spec.attention
        self.watch: Watch | None = None
        """Told of every layer's attention while it is set."""

    def embed(self, batch: Batch) -> torch.Tensor:
        """Input vectors [B, L, D]: token embeddings, sinks, and at a target's last token what it is told beside."""
        tokens = self.backbone.get_input_embeddings()(batch.input_ids)  # pyright: ignore[reportCallIssue]
        if self.sinks is not None:
            index = batch.sink_positions[:, :, None].expand(-1, -1, tokens.shape[-1])
            tokens = tokens.scatter(1, index, self.sinks(batch.signals, batch.sink_numbers).to(tokens.dtype))
        if self.target is not None:
            index = batch.asked_positions[:, :, None].expand(-1, -1, tokens.shape[-1])
            told = self.target(batch.asked_signals, batch.asked_numbers) * batch.asked_valid[:, :, None]
            tokens = tokens.scatter_add(1, index, told.to(tokens.dtype))
        return tokens

    def _asked_biases(self, batch: Batch) -> list[torch.Tensor]:
        """What each layer adds to the logits of those asked at sinks, [B, H, M, K]; none where the model has nothing to add."""
        found = [bias(batch.asked_times, batch.sink_times) for bias in self.temporal]
        # Without a single sink in what was built together no similarity was either.
        slots = (*batch.asked_valid.shape, batch.sink_valid.shape[1])
        known = batch.similarity if batch.similarity.shape[2] else batch.similarity.new_zeros(slots)
        similar = [bias(known) for bias in self.similarity]
        return [sum(pair) for pair in zip(found, similar, strict=True)] if found and similar else found or similar  # pyright: ignore[reportReturnType]

    def hidden_states(self, batch: Batch, readout: ReadoutSpec) -> torch.Tensor:
        """States after the final norm, [B, L, D].

        Raises:
            RuntimeError: the backbone did not pass the attention plan on to its attention.
        """
        sinks_only = readout.through_sinks
        if self.attention == "flex":
            plan = flex.inputs(batch, sinks_only, self.window)
        elif self.attention == "blocks":
            plan = blocks.inputs(batch, sinks_only, self.window)
        else:
            plan = sdpa.inputs(batch, sinks_only, self.window, bool(self.temporal or self.similarity))
        plan.watch = self.watch
        plan.at_asked.update(enumerate(self._asked_biases(batch)))
        out = self.backbone(
            inputs_embeds=plan.packing.pack(self.embed(batch))[None],
            attention_mask=None,
            position_ids=plan.packing.pack(batch.position_ids)[None],
            use_cache=False,
            attention_inputs=plan,
        )
        if len(plan.followed) != self.layers:
            raise RuntimeError(
                f"the attention of {self.layers - len(plan.followed)} of {self.layers} layers knew nothing of sinks and of where "
                f"sequences end: {type(self.backbone).__name__} does not pass keywords on to it, or has another backend"
            )
        return plan.packing.unpack(out.last_hidden_state[0])

    def forward(self, batch: Batch, readout: ReadoutSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (sum of the log losses of the valid targets, logits [B, T]), both in fp32."""
        # In here and not around the call: DeepSpeed switches off whatever autocast surrounds it.
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.mixed_precision):
            states = read(self.hidden_states(batch, readout), batch, readout)
        # Under autocast the head's matrix product would round logits to bfloat16's three digits, and make ties of them.
        with torch.autocast(states.device.type, enabled=False):
            logits = self.head(states.float(), batch.readout_numbers) + batch.base
        losses = functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
        return (losses * batch.readout_valid).sum(), logits


def decoder_layers(backbone: nn.Module) -> list[nn.Module]:
    """The decoder layers of a backbone, wrapped by PEFT or not, first to last.

    Raises:
        InputError: it is no plain decoder.
    """
    found = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and m and hasattr(m[0], "self_attn")]
    if len(found) != 1 or not getattr(found[0][0].self_attn, "is_causal", False):
        raise InputError(
            f"model.backbone: {type(backbone).__name__} is not one stack of decoder layers with causal self_attn; "
            "take a decoder such as llama, qwen2 or qwen3"
        )
    return list(found[0])
