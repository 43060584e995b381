"""Random decoders of known shapes, and random batches for them: what a step costs does not depend on what was learned."""

from typing import Any, Literal

import numpy as np

from ctrsink.config.model import BackboneSpec, BiasSpec, DecoderSpec, LoraSpec, SinkSpec
from ctrsink.config.stages import Group
from ctrsink.dataset.events import Events
from ctrsink.dataset.layout import Layout
from ctrsink.families.decoder.encode import encode
from ctrsink.families.facts import Wording
from ctrsink.features.ragged import Ragged
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.collate import collate
from ctrsink.sequences.windows import Cuts

VOCABULARY = 1024  # embeddings take no matrix product, so a small one costs what a large one does
TRAINED: tuple[Group, ...] = ("head", "lora", "sink", "bias")
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES: dict[str, tuple[int, ...]] = {
    "test": (32, 64, 2, 4, 2),
    "tiny": (128, 256, 3, 4, 4),  # configs/model/tiny-llama.yaml
    "smollm2": (576, 1536, 30, 9, 3),  # SmolLM2-135M
    "70m": (512, 1536, 16, 8, 8),
    "0.3b": (1024, 2816, 24, 16, 16),
    "0.5b": (896, 4864, 24, 14, 2),  # Qwen2.5-0.5B
    "1b": (2048, 5632, 22, 32, 4),  # TinyLlama-1.1B
    "1.5b": (1536, 8960, 28, 12, 2),  # Qwen2.5-1.5B
}


def shape_of(name: str, layers: int | None = None) -> dict[str, Any]:
    """Fields of a Llama's configuration; `layers` replaces its number of layers."""
    fields = dict(zip(_FIELDS, SHAPES[name], strict=True))
    more = {"num_hidden_layers": layers} if layers else {}
    return {"model_type": "llama", "max_position_embeddings": 65536} | fields | more


def random_spec(
    fields: dict[str, Any], sinks: bool, bias_layers: float, attention: Literal["sdpa", "flex"] = "sdpa"
) -> DecoderSpec:
    """A random model with LoRA; `bias_layers` is the share of the layers that carry the bias, 0 for none."""
    return DecoderSpec(
        backbone=BackboneSpec(config=fields),
        attention=attention,
        sinks=SinkSpec(signals=("previous_gap",)) if sinks else None,
        bias=BiasSpec(layers=bias_layers) if bias_layers else None,
        lora=LoraSpec(),
    )


def trained_groups(spec: DecoderSpec) -> tuple[Group, ...]:
    """The groups of TRAINED that the model has."""
    absent = {"sink": spec.sinks is None, "bias": spec.bias is None}
    return tuple(group for group in TRAINED if not absent.get(group))


def random_batch(rows: int, history: int, event_tokens: int, sinks: bool, seed: int = 0) -> Batch:
    """`rows` sequences of one target behind `history` behaviours of `event_tokens` tokens each, their sinks not counted."""
    chance = np.random.default_rng(seed)
    layout = Layout("decoder", "per_target", history, 1, ("previous_gap",) if sinks else (), 100)
    texts = Ragged.of([chance.integers(0, VOCABULARY, event_tokens - 1) for _ in range(64)])
    wording = Wording(Ragged.of([np.array([token]) for token in range(5)]), np.empty(0, np.int64))
    made = [_events(chance, history + 1, texts) for _ in range(rows)]
    cuts = Cuts(made, np.ones(rows, np.int64), np.zeros(rows, np.int64), Ragged.of([np.array([history])] * rows))
    return collate(encode(cuts, layout, wording), np.arange(rows), np.arange(rows))


def _events(chance: np.random.Generator, count: int, texts: Ragged) -> Events:
    """Of one user, every one an impression."""
    times = np.cumsum(np.exp(chance.uniform(0, 14, count)).astype(np.int64))
    labels = chance.integers(0, 2, count).astype(np.int8)
    return Events(chance.integers(0, 64, count), chance.integers(0, 5, count), times, labels, np.arange(count), texts)
