"""What a training step holds in memory: no logits over the vocabulary, nothing for frozen weights, few activations if asked."""

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from ctrsink.config.model import LoraSpec
from ctrsink.config.stages import Group, Objective, ReadoutSpec
from ctrsink.families.decoder.groups import trained_as
from ctrsink.families.decoder.model import CTRModel
from ctrsink.families.parameters import set_trainable
from ctrsink.sequences.batch import Batch
from ctrsink.train.engine import parameter_groups
from tests.builders import VOCABULARY, layout_of, random_batch, tiny_model, tiny_spec
from tests.padded import padded

READOUT = Objective(readout=ReadoutSpec(over="all"))
LIGHT: tuple[Group, ...] = ("sink", "bias", "head", "lora")
FULL: tuple[Group, ...] = ("sink", "bias", "head", "backbone")


class Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that any operation makes, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        return out

    def over_vocabulary(self) -> set[tuple[int, ...]]:
        return {shape for shape in self.seen if shape[-1:] == (VOCABULARY,)}


def model_of(trainable: tuple[Group, ...], precision: str = "fp32", **more: Any) -> CTRModel:
    model = tiny_model(tiny_spec(lora=LoraSpec(rank=2) if "lora" in trainable else None, **more), precision=precision).train()
    set_trainable(model, trainable)
    return model


def batch_of() -> Batch:
    return random_batch(5, layout_of(), (8, 4, 1))


@pytest.mark.parametrize("trainable", [LIGHT, FULL], ids=["lora", "full"])
def test_no_logits_over_the_vocabulary_are_made(trainable: tuple[Group, ...]) -> None:
    model, batch = model_of(trainable), batch_of()
    assert VOCABULARY not in (*padded(batch).input_ids.shape, batch.tokens)
    with Shapes() as shapes:
        loss, _, _ = model(batch, READOUT)
        forward = set(shapes.seen)
        loss.backward()
    assert (batch.tokens, 32) in forward
    assert shapes.seen > forward  # the backward pass was watched too
    assert not shapes.over_vocabulary()


def test_logits_over_the_vocabulary_would_be_seen() -> None:
    backbone: Any = model_of(LIGHT).backbone
    language_model = AutoModelForCausalLM.from_config(backbone.config, attn_implementation="sdpa")
    with Shapes() as shapes:
        language_model(input_ids=padded(batch_of()).input_ids)
    assert shapes.over_vocabulary()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("trainable", [("sink", "bias", "head"), LIGHT, FULL], ids=["sinks", "lora", "full"])
def test_frozen_weights_have_neither_gradients_nor_optimizer_state(trainable: tuple[Group, ...], precision: str) -> None:
    """And a step in bfloat16 moves what is trained, in fp32, by finite amounts."""
    model, batch = model_of(trainable, precision), batch_of()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name: p for name, p in model.named_parameters() if trained_as(name, trainable)}
    optimizer = torch.optim.AdamW(parameter_groups(model, trainable, 0.01), lr=1e-2)
    losses = []
    for _ in range(3):  # lora_A has its first gradient in the second
        optimizer.zero_grad()
        loss, _, _ = model(batch, READOUT)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    held = {id(p) for p in optimizer.state}
    for name, parameter in model.named_parameters():
        if name not in trained:
            assert parameter.grad is None
            assert not parameter.requires_grad
            assert id(parameter) not in held
            assert parameter.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
            assert torch.equal(parameter, before[name])
        else:
            assert parameter.dtype == torch.float32
            assert torch.isfinite(parameter).all()
            assert id(parameter) in held
    moved = {name for name in trained if not torch.equal(trained[name], before[name])}
    assert {trained_as(name, trainable) for name in moved} == set(trainable)
    moments = sum(v.numel() for state in optimizer.state.values() for v in state.values() if v.numel() > 1)
    assert moments == 2 * sum(p.numel() for p in trained.values() if p.numel() > 1)


def saved_bytes(model: CTRModel, batch: Batch) -> int:
    """Bytes of different storages, weights apart, that the forward pass keeps for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address comes twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _, _ = model(batch, READOUT)
    loss.backward()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("trainable", [LIGHT, FULL], ids=["lora", "full"])
def test_checkpointing_keeps_a_layers_input_instead_of_its_activations(trainable: tuple[Group, ...]) -> None:
    batch, layers = batch_of(), (2, 6)
    plain = [saved_bytes(model_of(trainable, layers=n), batch) for n in layers]
    saving = [saved_bytes(model_of(trainable, layers=n, gradient_checkpointing=True), batch) for n in layers]
    state = padded(batch).input_ids.numel() * 32 * 4
    added = (plain[1] - plain[0]) / 4, (saving[1] - saving[0]) / 4
    assert added[0] > 8 * state
    assert added[1] <= 2 * state
