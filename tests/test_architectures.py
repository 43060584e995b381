"""Every architecture that the project names, as a tiny random model: what it computes, what learns, what is stored."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel

import ctrsink.serve  # makes the model type known  # noqa: F401
from ctrsink.attention.kinds import FEEDBACK, PAD, PREFIX, SINK, TEXT
from ctrsink.config.model import BiasSpec, DecoderSpec, LoraSpec
from ctrsink.config.stages import Objective, ReadoutSpec
from ctrsink.export.package import export_run
from ctrsink.families.decoder.build import build_model
from ctrsink.families.decoder.groups import group_of
from ctrsink.families.decoder.model import CTRModel
from ctrsink.families.parameters import load_parameters, set_trainable
from ctrsink.families.registry import source_of
from ctrsink.sequences.batch import Batch
from ctrsink.train.restore import restore_run
from tests.builders import VOCABULARY, layout_of, random_batch, tiny_model, tiny_spec
from tests.padded import changed, in_rows, padded, states_of
from tests.serving_fixtures import Prepared, prepared, run_spec, write_run

ALL, POOL = Objective(readout=ReadoutSpec(over="all")), Objective(readout=ReadoutSpec(over="sinks", form="pool"))
WIDTH = {"hidden_size": 64, "intermediate_size": 96}
# Gemma's heads are wider than its states divided by their number; Mistral's own default is a window.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "gemma": {"head_dim": 32},
    "phi3": {},
    "olmo2": {},
}
close = torch.testing.assert_close
pytestmark = pytest.mark.parametrize("kind", KINDS)


def spec_of(kind: str, **more: Any) -> DecoderSpec:
    return tiny_spec(kind, fields=WIDTH | KINDS[kind], bias=BiasSpec(layers=1.0, gamma=2.0), **more)


def plain_transformers(model: CTRModel) -> Any:
    """The backbone's weights in the class that transformers builds, with its own attention."""
    backbone: Any = model.backbone
    plain = AutoModel.from_config(copy.deepcopy(backbone.config), attn_implementation="sdpa").eval()
    plain.load_state_dict(backbone.state_dict())
    return plain


def run(model: CTRModel, batch: Batch, objective: Objective) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of the valid targets and the gradients of their loss."""
    model.zero_grad(set_to_none=True)
    out = model(batch, objective)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.logits[batch.targets.counted].detach(), grads


@torch.no_grad()
def test_without_sinks_it_is_the_plain_model(kind: str) -> None:
    """Also what a model does to its embeddings (Gemma multiplies them) happens once."""
    model, batch = tiny_model(spec_of(kind, sinks=False)), random_batch(3, layout_of(signals=()), (7, 2, 4))
    of = padded(batch)
    mask = of.kinds != PAD
    mine = states_of(model, batch, ALL)
    expected = plain_transformers(model)(input_ids=of.input_ids, attention_mask=mask.long()).last_hidden_state
    close(mine[mask], expected[mask], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sequences_too_short_for_a_sink_are_the_plain_model(kind: str) -> None:
    model, batch = tiny_model(spec_of(kind)), random_batch(3, layout_of(), (1, 1))
    of = padded(batch)
    assert not of.sink_valid.any()
    mask = of.kinds != PAD
    expected = plain_transformers(model)(input_ids=of.input_ids, attention_mask=mask.long()).last_hidden_state
    close(states_of(model, batch, ALL)[mask], expected[mask], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_a_bias_sinks_are_nothing_but_vectors(kind: str) -> None:
    """With gamma 0 the plain model computes the same from the same vectors, and with another gamma it does not."""
    model, batch = tiny_model(spec_of(kind)), random_batch(3, layout_of(), (7, 2, 4))
    vectors: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        vectors.append(in_rows(batch, kwargs["inputs_embeds"][0]))

    handle = model.backbone.register_forward_pre_hook(keep, with_kwargs=True)
    biased = states_of(model, batch, ALL)
    for bias in model.biases:
        bias.get_parameter("gamma").data.zero_()
    mine = states_of(model, batch, ALL)
    handle.remove()
    mask = padded(batch).kinds != PAD
    expected = plain_transformers(model)(inputs_embeds=vectors[0], attention_mask=mask.long()).last_hidden_state
    close(mine[mask], expected[mask], atol=1e-5, rtol=1e-5)
    assert (biased[mask] - expected[mask]).abs().max() > 1e-3


@torch.no_grad()
def test_nothing_before_a_changed_position_moves(kind: str) -> None:
    model, batch = tiny_model(spec_of(kind)), random_batch(1, layout_of(), (6, 4))
    before = states_of(model, batch, ALL)
    of = padded(batch)
    kinds = of.kinds[0].tolist()
    # The first and the last of each kind: a prefix, a text, a feedback and a sink token are all changed.
    first_and_last = {find(kinds, k) for k in (PREFIX, TEXT, FEEDBACK, SINK) for find in (list.index, last_index)}
    for at in sorted(first_and_last):
        ids, signals = batch.inputs["input_ids"].clone(), batch.inputs["signals"].clone()
        if kinds[at] == SINK:
            slot = of.sinks[0].tolist().index(at)  # of the first sequence, as the position is: its number in the batch
            signals[slot] = (signals[slot] + 1) % 10
        else:
            ids[at] = (ids[at] + 1) % VOCABULARY
        after = states_of(model, changed(batch, input_ids=ids, signals=signals), ALL)
        assert torch.equal(after[0, :at], before[0, :at])
        assert (after[0, at] - before[0, at]).abs().max() > 1e-4
        assert torch.equal(after[1], before[1])


def last_index(values: list[int], value: int) -> int:
    return len(values) - 1 - values[::-1].index(value)


def test_every_parameter_of_sinks_and_bias_learns(kind: str) -> None:
    model = tiny_model(spec_of(kind))
    _, grads = run(model, random_batch(5, layout_of(), (8, 4)), POOL)
    expected = {name for name, _ in model.named_parameters() if group_of(name) in ("sink", "bias", "head")}
    assert len(expected) == 3 + 2 * 7 + 4
    for name in expected:
        if not name.endswith("key.bias"):  # the same addition to all scores of a row: softmax does not see it
            assert grads[name].abs().max() > 1e-8, name


def test_gradient_checkpointing_changes_no_gradient_and_warns_of_nothing(kind: str) -> None:
    batch = random_batch(5, layout_of(), (8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saving = tiny_model(spec_of(kind, gradient_checkpointing=True)).train()
        other, recomputed = run(saving, batch, POOL)
    assert sum(getattr(module, "gradient_checkpointing", False) is True for module in saving.backbone.layers) == 2  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
    logits, grads = run(tiny_model(spec_of(kind)).train(), batch, POOL)
    close(other, logits)
    assert recomputed.keys() == grads.keys()
    for name in grads:
        close(recomputed[name], grads[name])


def test_lora_adapts_every_linear_layer_and_the_base_gets_no_gradient(kind: str) -> None:
    model = tiny_model(spec_of(kind, lora=LoraSpec(rank=2)))
    linear = [n for n, m in model.backbone.named_modules() if type(m) is nn.Linear and "lora" not in n]
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {"backbone." + name.removesuffix(".base_layer") for name in linear}
    assert len(adapted) == 2 * (4 if kind == "phi3" else 7)
    set_trainable(model, ("sink", "bias", "head", "lora"))
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:  # 0 at the start, when lora_A has no gradient yet
            nn.init.normal_(parameter, std=0.1)
    _, grads = run(model, random_batch(5, layout_of(), (8, 4)), POOL)
    assert {group_of(name) for name in grads} == {"sink", "bias", "head", "lora"}
    assert {name.split(".lora_")[0] for name, grad in grads.items() if ".lora_A" in name and grad.any()} == adapted
    assert {name.split(".lora_")[0] for name, grad in grads.items() if ".lora_B" in name and grad.any()} == adapted


def test_bfloat16_stays_near_fp32_and_trains_in_fp32(kind: str) -> None:
    spec, batch = spec_of(kind, lora=LoraSpec(rank=2)), random_batch(5, layout_of(), (8, 4))
    model = tiny_model(spec, precision="bf16")
    set_trainable(model, ("sink", "bias", "head", "lora"))
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    logits, grads = run(model, batch, POOL)
    expected, _ = run(tiny_model(spec), batch, POOL)
    assert (logits - expected).abs().max() < 0.1
    assert expected.std() > 0.1  # the readouts differ by more than what rounding may change
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert all(torch.isfinite(grad).all() for grad in grads.values())


@torch.no_grad()
def test_a_model_goes_on_from_stored_parameters(kind: str) -> None:
    """What a stage trained is all that a checkpoint holds; the rest comes from the seed again."""
    spec, batch = spec_of(kind, lora=LoraSpec(rank=2)), random_batch(5, layout_of(), (8, 4))
    first, again = tiny_model(spec), tiny_model(spec)
    stored = {}
    for name, parameter in first.named_parameters():
        if group_of(name) in ("sink", "bias", "head", "lora"):
            parameter += 0.1 * torch.randn_like(parameter)
            stored[name] = parameter.clone()
    expected = first(batch, POOL).logits
    assert (again(batch, POOL).logits - expected)[batch.targets.counted].abs().max() > 1e-3
    load_parameters(again, stored)
    close(again(batch, POOL).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_folder_of_the_backbone_builds_the_same_model(kind: str, tmp_path: Path) -> None:
    spec, batch = spec_of(kind), random_batch(5, layout_of(), (8, 4))
    made = tiny_model(spec)
    made.backbone.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    loaded = build_model(spec.model_copy(update={"backbone": spec.backbone.model_copy(update=folder(tmp_path))}), VOCABULARY, 1)
    load_parameters(loaded, {n: p for n, p in made.named_parameters() if group_of(n) in ("sink", "bias", "head")})
    close(loaded.eval()(batch, POOL).logits, made(batch, POOL).logits)


def folder(path: Path) -> dict[str, Any]:
    return {"path": str(path), "config": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("architectures"))


@torch.no_grad()
def test_a_run_is_exported_with_its_lora_merged(kind: str, data: Prepared, tmp_path: Path) -> None:
    backbone = spec_of(kind).backbone.model_dump(mode="json")
    spec = run_spec(data, str(tmp_path / "run"), model={"backbone": backbone})
    write_run(spec)
    merged = export_run(spec.run_dir, str(tmp_path / "out"))["merged_layers"]
    assert merged == 2 * (4 if kind == "phi3" else 7)
    trained = restore_run(spec.run_dir)
    batch = source_of(trained.dataset, "test", trained.layout).build(torch.arange(4).numpy())
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    close(model(batch), trained.model(batch, trained.objective).logits, atol=1e-5, rtol=0)
