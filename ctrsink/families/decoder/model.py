"""CTRModel: a decoder backbone with sinks, inter-sink bias and a click head."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ctrsink.attention import blocks, chunked_blocks, chunked_flex, chunked_sdpa, flex, sdpa
from ctrsink.attention.chunked import Chunked, ChunkedInputs
from ctrsink.attention.inputs import AttentionInputs, Watch
from ctrsink.attention.packed import Packed
from ctrsink.config.model import DecoderSpec, SparseSinksSpec
from ctrsink.config.stages import Objective
from ctrsink.dataset.layout import Layout
from ctrsink.errors import InputError
from ctrsink.families.decoder.bias import InterSinkBias, attach
from ctrsink.families.decoder.cost import flop_count
from ctrsink.families.decoder.embeddings import SignalEmbedding, Table, token_scale
from ctrsink.families.decoder.groups import group_of, trained_as
from ctrsink.families.decoder.head import ClickHead, JointHead, LinearHead
from ctrsink.families.decoder.look import gammas_and_shares
from ctrsink.families.decoder.readout import read
from ctrsink.families.decoder.recall import KeptHistory, begun, forgets, recall
from ctrsink.families.decoder.shares import watched
from ctrsink.families.decoder.similarity import SimilarityBias, similarity_of
from ctrsink.families.decoder.summaries import SummaryBias
from ctrsink.families.decoder.temporal import TemporalBias
from ctrsink.families.protocol import CTRModule, Flops, Out
from ctrsink.features.registry import SIGNALS, signal
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.columns import TARGETS, Sequences

BACKENDS = {"sdpa": sdpa.BACKEND, "blocks": blocks.BACKEND, "flex": flex.BACKEND}
"""Names under which transformers knows the attention of each `model.attention`."""
BY_CHUNKS = {"sdpa": chunked_sdpa.BACKEND, "blocks": chunked_blocks.BACKEND, "flex": chunked_flex.BACKEND}
"""The same with `model.sparse`."""


class CTRModel(CTRModule):
    """Click probabilities of the targets in a Batch (CTR-Sink, arXiv 2508.03668).

    Args:
        backbone: a decoder without its vocabulary head, whose attention implementation is `backend_of(spec)`.
        spec: which sinks and bias it carries.
    """

    large = ("backbone",)

    def __init__(self, backbone: nn.Module, spec: DecoderSpec) -> None:
        super().__init__()
        config: Any = backbone.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.backbone = backbone
        self.head = ClickHead(hidden) if spec.head == "norm" else LinearHead(hidden)
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
        self.summaries = nn.ModuleList()
        if spec.sparse is not None and spec.sparse.summary_bias:
            self.summaries.extend(SummaryBias(heads) for _ in decoder_layers(backbone))
        self.layers = len(decoder_layers(backbone))
        self.window, self.sparse = spec.window, spec.sparse
        self.attention = spec.attention
        self.watch: Watch | None = None
        """Told of every layer's attention while it is set."""

    def embed(self, batch: Batch) -> torch.Tensor:
        """Input vectors [N, D]: token embeddings, sinks, and at a target's last token what it is told beside."""
        read = batch.inputs
        tokens = self.backbone.get_input_embeddings()(read["input_ids"])  # pyright: ignore[reportCallIssue]
        if self.sinks is not None:
            vectors = self.sinks(read["signals"], read["sink_numbers"])
            tokens = tokens.index_copy(0, read["sink_positions"], vectors.to(tokens.dtype))
        if self.target is not None:
            told = self.target(read["asked_signals"], read["asked_numbers"])
            tokens = tokens.index_add(0, read["asked_positions"], told.to(tokens.dtype))
        return tokens

    def asked_biases(self, batch: Batch, packed: Packed) -> list[torch.Tensor]:
        """What each layer adds to the logits of those asked at sinks, [B, H, M, K]; none where the model has nothing to add."""
        found = similar = []
        if self.temporal:
            sides = (("asked_times", packed.asked), ("sink_times", packed.sinks))
            asked, seen = (of.axis.pad(batch.inputs[name], of.width) for name, of in sides)
            found = [bias(asked, seen) for bias in self.temporal]
        if self.similarity:
            known = similarity_of(batch, packed)
            similar = [bias(known) for bias in self.similarity]
        return [sum(pair) for pair in zip(found, similar, strict=True)] if found and similar else found or similar  # pyright: ignore[reportReturnType]

    def hidden_states(self, batch: Batch, packed: Packed, objective: Objective) -> torch.Tensor:
        """States after the final norm, [N, D]."""
        given = self._inputs(batch, packed, objective.readout.through_sinks)
        given.watch = self.watch
        given.at_asked.update(enumerate(self.asked_biases(batch, packed)))
        embedded, position_ids, count = self.embed(batch), batch.inputs["position_ids"], packed.sequences.total
        if (missing := given.length - count) > 0:
            embedded, position_ids = functional.pad(embedded, (0, 0, 0, missing)), functional.pad(position_ids, (0, missing))
        return self.through_backbone(embedded, position_ids, given)[:count]

    def through_backbone(self, embedded: torch.Tensor, position_ids: torch.Tensor, given: AttentionInputs) -> torch.Tensor:
        """Input vectors [N, D] and positions, int64 [N] -> states after the final norm, [N, D].

        Raises:
            RuntimeError: the backbone did not pass the attention's inputs on to it.
        """
        out = self.backbone(
            inputs_embeds=embedded[None],
            attention_mask=None,
            position_ids=position_ids[None],
            use_cache=False,
            attention_inputs=given,
        )
        if len(given.followed) != self.layers:
            raise RuntimeError(
                f"the attention of {self.layers - len(given.followed)} of {self.layers} layers knew nothing of sinks and of "
                f"where sequences end: {type(self.backbone).__name__} does not pass keywords on to it, or has another backend"
            )
        return out.last_hidden_state[0]

    def _inputs(self, batch: Batch, packed: Packed, sinks_only: bool) -> AttentionInputs:
        if self.sparse is not None:
            return self._chunked(Chunked.of(batch, packed), packed, self.sparse)
        if self.attention == "flex":
            return flex.inputs(packed, sinks_only, self.window)
        if self.attention == "blocks":
            return blocks.inputs(packed, sinks_only, self.window)
        return sdpa.inputs(packed, sinks_only, self.window, bool(self.temporal or self.similarity))

    def _chunked(self, chunked: Chunked, packed: Packed, sparse: SparseSinksSpec) -> ChunkedInputs:
        if self.attention == "blocks":
            given = chunked_blocks.inputs(packed, chunked, sparse)
        elif self.attention == "flex":
            given = chunked_flex.inputs(packed, chunked)
        else:
            given = chunked_sdpa.inputs(packed, chunked)
        given.at_means.update(enumerate(bias() for bias in self.summaries))
        return given

    def forward(self, batch: Batch, objective: Objective) -> Out:
        targets = batch.targets
        # In here and not around the call: DeepSpeed switches off whatever autocast surrounds it.
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.mixed_precision):
            packed = Packed.of(batch)
            states = self.hidden_states(batch, packed, objective)
            states = read(states, packed, batch.inputs["readout_positions"], batch.axes[TARGETS], objective.readout)
        # Under autocast the head's matrix product would round logits to bfloat16's three digits, and make ties of them.
        with torch.autocast(states.device.type, enabled=False):
            logits = self.head(states.float(), batch.inputs["readout_numbers"]) + batch.inputs["base"]
        losses = functional.binary_cross_entropy_with_logits(logits, targets.labels, reduction="none")
        return Out((losses * targets.counted).sum(), logits)

    def forgets(self, layout: Layout) -> str | None:
        return forgets(self, layout)

    def narrows(self, objective: Objective) -> bool:
        return objective.readout.through_sinks or self.window is not None

    def begun(self, sequence: Sequences, before: Any) -> KeptHistory:
        return begun(sequence, before)

    def recall(
        self, batch: Batch, objective: Objective, histories: Sequence[Any], of: list[int]
    ) -> tuple[torch.Tensor, list[KeptHistory]]:
        return recall(self, batch, objective, list(histories), of)

    def group_of(self, name: str) -> str:
        return group_of(name)

    def trained_as(self, name: str, trainable: tuple[str, ...]) -> str | None:
        return trained_as(name, trainable)

    def flop_count(self, objective: Objective) -> Callable[[Batch], Flops]:
        return flop_count(self, objective.readout.through_sinks)

    def look(self, batch: Batch, objective: Objective, forward: Callable[[Batch, Objective], Any]) -> dict[str, float]:
        return gammas_and_shares(self, batch, objective, forward)

    def paid(self, batch: Batch, objective: Objective) -> torch.Tensor | None:
        with torch.inference_mode(), watched(self, batch, objective) as share:
            self(batch, objective)
        if share.paid is None:
            return None
        return share.paid[0, batch.axes["asked"].longest - 1, : batch.axes["sinks"].longest]


def backend_of(spec: DecoderSpec) -> str:
    """The name under which transformers knows the attention of a model."""
    return BACKENDS[spec.attention] if spec.sparse is None else BY_CHUNKS[spec.attention]


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
