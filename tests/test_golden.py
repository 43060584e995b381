"""Parity with the published CTR-Sink code: values it gave on a random Qwen2 (fp32, eager attention)."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import Qwen2Config, Qwen2Model

from ctrsink.attention import sdpa
from ctrsink.attention.kinds import SINK, TEXT
from ctrsink.attention.packed import Packed
from ctrsink.config.model import BackboneSpec, BiasSpec, DecoderSpec, SinkSpec
from ctrsink.config.stages import Objective
from ctrsink.families.decoder.model import CTRModel
from ctrsink.sequences.batch import Axis, Batch, Targets

GOLDEN = Path(os.environ.get("CTRSINK_GOLDEN", Path(__file__).parent / "golden" / "ctr_sink_qwen2_a.safetensors"))
# The names of the published modules, and ours.
RENAMED = {"norm": "norm", "query_proj": "query", "key_proj": "key"}


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(GOLDEN, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    meta = {
        "config": json.loads(metadata["config"]),
        "gamma": float(metadata["sink_scale"]),
        "layers": int(metadata["inter_sink_layers"]),
    }
    return tensors, meta


def build(tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> CTRModel:
    config = Qwen2Config(**meta["config"], attn_implementation=sdpa.BACKEND)
    table = tensors["sink_embedding.0.weight"]
    spec = DecoderSpec(
        backbone=BackboneSpec(config={"model_type": "qwen2"}),
        sinks=SinkSpec(signals=("recency_rank",), buckets=table.shape[0], embedding_size=table.shape[1]),
        bias=BiasSpec(layers=meta["layers"] / config.num_hidden_layers, gamma=meta["gamma"], causal=False),
    )
    model = CTRModel(Qwen2Model(config), spec).eval()
    state: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if name.startswith("sink_embedding.0"):
            state["sinks.categories.tables.0.weight"] = value
        elif name.startswith("sink_embedding.1."):
            state[name.replace("sink_embedding.1", "sinks.categories.projection")] = value
        elif ".sink_interaction." in name:
            layer, _, module, kind = name.removeprefix("backbone.layers.").replace(".self_attn", "").split(".")
            state[f"biases.{layer}.{RENAMED[module]}.{kind}"] = value
        elif name.endswith(".sink_scale"):
            state[f"biases.{name.split('.')[2]}.gamma"] = value.reshape(1)
        elif name.startswith("backbone."):
            state[name] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all(name.startswith("head.") for name in missing)
    return model


def batch_of(tensors: dict[str, torch.Tensor]) -> Batch:
    """The file's rows one behind another, without their padding, which is on the right; there are no targets."""
    ids, mask, at = tensors["in.input_ids"], tensors["in.attention_mask"].bool(), tensors["in.sink_positions"]
    lengths = mask.sum(1)
    assert torch.equal(mask, torch.arange(ids.shape[1]) < lengths[:, None])
    positions, sinks, nothing = (
        Axis.of(of) for of in (lengths.numpy(), np.full(len(ids), at.shape[1]), np.zeros(len(ids), np.int64))
    )
    n, k = positions.total, sinks.total
    kinds = torch.full_like(ids, TEXT).scatter(1, at, torch.full_like(at, SINK)).to(torch.uint8)
    none, no_tokens = torch.zeros(0, dtype=torch.long), torch.zeros(n, dtype=torch.bool)
    return Batch(
        targets=Targets(labels=none.float(), users=none, events=none, times=none, counted=none.bool()),
        inputs={
            "input_ids": positions.pack(ids),
            "kinds": positions.pack(kinds),
            "event_ids": torch.zeros(n, dtype=torch.int32),
            "aligned": no_tokens,
            "candidate": no_tokens,
            "position_ids": positions.place,
            "sink_positions": sinks.pack(at) + positions.offsets[sinks.owner],
            "signals": sinks.pack(tensors["in.signal_ids"])[:, None],
            "sink_numbers": torch.zeros(k, 0),
            "sink_times": torch.zeros(k, dtype=torch.long),
            "readout_positions": none,
            "readout_numbers": torch.zeros(0, 0),
            "base": none.float(),
            "asked_positions": none,
            "asked_times": none,
            "asked_signals": torch.zeros(0, 0, dtype=torch.long),
            "asked_numbers": torch.zeros(0, 0),
            "similarity": none.float(),
        },
        axes={"positions": positions, "sinks": sinks}
        | dict.fromkeys(("targets", "asked", "pairs", "aligned", "candidates", "asked_rows", "places", "span"), nothing),
        tokens=n,
        impressions=0,
    )


def states_of(model: CTRModel, batch: Batch, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """In rows as long as the file's, zeros at padding."""
    found = model.hidden_states(batch, Packed.of(batch), Objective())
    return batch.axes["positions"].pad(found, tensors["in.input_ids"].shape[1])


def masked_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The published pooling: the mean of states [B, L, D] where mask [B, L] holds."""
    weight = mask.float()[:, :, None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def test_hidden_states_and_pooling_match_the_published_code(golden: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> None:
    tensors, meta = golden
    model, batch = build(tensors, meta), batch_of(tensors)
    with torch.no_grad():
        vectors, hidden = model.embed(batch), states_of(model, batch, tensors)
    valid = tensors["in.attention_mask"].bool()
    torch.testing.assert_close(vectors, tensors["out.inputs_embeds"][valid], atol=1e-5, rtol=0)
    sinks = torch.zeros_like(valid).scatter(1, tensors["in.sink_positions"], True)
    torch.testing.assert_close(hidden[valid], tensors["out.hidden_states"][valid], atol=1e-5, rtol=0)
    torch.testing.assert_close(masked_mean(hidden, sinks), tensors["out.pooled_sinks"], atol=1e-5, rtol=0)
    torch.testing.assert_close(masked_mean(hidden, valid), tensors["out.pooled_all"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("gamma", [None, 0.37, -2.0])
def test_the_first_layers_bias_is_gamma_times_the_published_table(
    golden: tuple[dict[str, torch.Tensor], dict[str, Any]], gamma: float | None
) -> None:
    """The file has B before its scale (`sink_scale`): only with a scale of 1 is it what is added to the logits."""
    tensors, meta = golden
    model, batch = build(tensors, meta), batch_of(tensors)
    scale = model.biases[0].get_parameter("gamma")
    first: list[torch.Tensor] = []
    model.biases[0].register_forward_hook(lambda module, args, out: first.append(out))
    with torch.no_grad():
        if gamma is not None:
            scale.fill_(gamma)
        states_of(model, batch, tensors)
    index, length = tensors["in.sink_positions"], tensors["in.input_ids"].shape[1]
    rows = tensors["out.layer0_inter_sink_bias"].gather(1, index[:, :, None].expand(-1, -1, length))
    table = rows.gather(2, index[:, None, :].expand(-1, index.shape[1], -1))
    torch.testing.assert_close(first[0], scale * table, atol=1e-5, rtol=0)


def test_gamma_zero_is_the_plain_model(golden: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> None:
    tensors, meta = golden
    model, batch = build(tensors, meta), batch_of(tensors)
    valid = tensors["in.attention_mask"].bool()
    with torch.no_grad():
        for bias in model.biases:
            bias.get_parameter("gamma").zero_()
        hidden = states_of(model, batch, tensors)
    torch.testing.assert_close(hidden[valid], tensors["out.hidden_states_without_bias"][valid], atol=1e-5, rtol=0)
