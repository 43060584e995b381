"""Attention that would be computed wrongly is refused with its reason; a window that no sequence feels is not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, GptOssModel

from ctrsink.attention.kinds import PAD
from ctrsink.config.model import BackboneSpec, DecoderSpec, LoraSpec
from ctrsink.config.stages import Objective, ReadoutSpec
from ctrsink.errors import InputError
from ctrsink.families.decoder.build import build_model
from ctrsink.families.decoder.model import CTRModel
from ctrsink.families.hf import CLASSES
from ctrsink.families.registry import family_of
from tests.builders import VOCABULARY, layout_of, random_batch, tiny_model, tiny_spec
from tests.padded import padded, states_of

ALL = Objective(readout=ReadoutSpec(over="all"))
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def refused(kind: str, **fields: Any) -> str:
    spec = DecoderSpec(backbone=BackboneSpec(config=TINY | {"model_type": kind} | fields))
    with pytest.raises(InputError) as caught:
        build_model(spec, VOCABULARY, 0)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model.backbone: ")
    return message


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("gemma2", {}, "gemma2 uses sliding_attention in some layers and soft-capped attention logits"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "gemma2 uses soft-capped attention logits"),
        ("gemma3_text", {"num_hidden_layers": 6}, "gemma3_text uses sliding_attention in some layers"),
        ("gpt_oss", {}, "gpt_oss uses sliding_attention in some layers"),
        ("mistral", {}, "set model.backbone.config.sliding_window: null"),
        ("phi3", {"sliding_window": 2047}, "set model.backbone.config.sliding_window: null"),
    ],
)
def test_other_attention_is_refused_with_its_reason(kind: str, fields: dict[str, Any], reason: str) -> None:
    assert reason in refused(kind, **fields)


FULL = {"layer_types": ["full_attention"] * 2, "sliding_window": None, "num_local_experts": 2}


def test_attention_sinks_are_refused_where_transformers_would_drop_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GptOssModel, "_supports_sdpa", True)
    assert "attention sinks of its own" in refused("gpt_oss", **FULL)


def stored(kind: str, path: Path, **fields: Any) -> DecoderSpec:
    """A tiny model of the architecture in a folder, as one downloads it."""
    made = tiny_model(tiny_spec(kind, fields={"sliding_window": None}))
    config: Any = made.backbone.config
    for name, value in fields.items():
        setattr(config, name, value)
    made.backbone.save_pretrained(path)  # pyright: ignore[reportCallIssue]
    return tiny_spec(kind).model_copy(update={"backbone": BackboneSpec(path=str(path))})


def longest(model: CTRModel, events: tuple[int, ...]) -> int:
    batch = random_batch(3, layout_of(history=9), events)
    with torch.no_grad():
        states_of(model, batch, ALL)
    return padded(batch).input_ids.shape[1]


@pytest.mark.parametrize("kind", ["mistral", "phi3"])
def test_a_pretrained_window_is_exact_up_to_its_length_and_refused_beyond(kind: str, tmp_path: Path) -> None:
    batch = random_batch(3, layout_of(signals=()), (6, 2))
    of = padded(batch)
    mask, window = of.kinds != PAD, of.input_ids.shape[1]
    spec = stored(kind, tmp_path, sliding_window=window)
    model = tiny_model(spec.model_copy(update={"sinks": None, "bias": None}))
    windowed = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        expected = windowed(input_ids=of.input_ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(states_of(model, batch, ALL)[mask], expected[mask], atol=1e-5, rtol=1e-5)
        # The window is at work in what it is compared with.
        windowed.config.sliding_window = window // 2
        other = windowed(input_ids=of.input_ids, attention_mask=mask.long()).last_hidden_state
    assert (other - expected)[mask].abs().max() > 1e-3
    reason = rf"{kind} has a sliding window of {window} positions, a sequence of the data \d+: lower data\.history"
    with pytest.raises(InputError, match=reason):
        longest(tiny_model(spec), (12, 1))


def test_frequencies_that_depend_on_the_batch_are_refused_beyond_the_original_length(tmp_path: Path) -> None:
    """A long neighbour would change what a short sequence gives."""
    rope = LONG | {"original_max_position_embeddings": 40}
    spec = tiny_spec(
        "phi3", fields={"rope_scaling": rope, "max_position_embeddings": 160, "original_max_position_embeddings": 40}
    )
    assert longest(tiny_model(spec), (6, 1)) <= 40
    with pytest.raises(InputError, match="rope_type longrope, whose frequencies change after 40 positions"):
        longest(tiny_model(spec), (12, 1))
    dynamic = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 40}
    with pytest.raises(InputError, match="rope_type dynamic, whose frequencies change after 40 positions"):
        longest(tiny_model(tiny_spec("llama", fields=dynamic)), (12, 1))


def test_frequencies_of_an_exported_model_are_those_that_were_trained(tmp_path: Path) -> None:
    """They are in no file: the class computes them when it loads."""
    rope = LONG | {"short_factor": [1.0, 1.5, 2.0, 3.0], "original_max_position_embeddings": 40}
    fields = {"rope_scaling": rope, "max_position_embeddings": 160, "original_max_position_embeddings": 40}
    spec = tiny_spec("phi3", fields=fields)
    model, batch = tiny_model(spec), random_batch(3, layout_of(), (6, 1))
    with torch.inference_mode():
        expected = model(batch, ALL).logits
        plain = family_of("decoder").merged(model, spec).section
        config, kind = CLASSES["decoder"]
        exported = kind(config(model=plain, facts={"vocabulary": VOCABULARY}, objective=ALL.model_dump(mode="json")))
        exported.ctr.load_state_dict(model.state_dict())
        exported.save_pretrained(tmp_path)
        found = kind.from_pretrained(tmp_path).eval()(batch)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_lora_targets_are_named_by_the_layers_that_exist() -> None:
    """One name that fits is not enough: the layers of the other would go without adapters."""
    spec = tiny_spec("phi3", lora=LoraSpec(rank=2, targets=("q_proj", "o_proj")))
    with pytest.raises(InputError) as caught:
        build_model(spec, VOCABULARY, 0)
    layers = "o_proj, qkv_proj, gate_up_proj, down_proj"
    assert str(caught.value) == f"model.lora.targets ['q_proj']: the linear layers of Phi3Model are {layers}"
