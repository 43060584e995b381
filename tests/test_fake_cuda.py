"""A whole forward and backward pass of every family and backend on a card that is not there: see fake_cuda."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn.attention.flex_attention import AuxOutput, BlockMask

from ctrsink.attention import flex
from ctrsink.config.model import BiasSpec, LoraSpec
from ctrsink.config.stages import Objective, ReadoutSpec
from ctrsink.families.protocol import CTRModule
from ctrsink.families.registry import family_of
from ctrsink.sequences.batch import Batch
from tests.builders import form_batch, tiny_model, tiny_spec
from tests.chunked_fixtures import a_batch, a_model, sparse
from tests.fake_cuda import CARD, fake_cuda, moved, sent
from tests.ids_fixtures import FACTS, FORMS, ids_batch
from tests.test_ids_families import ALL_SPECS, users

ALL, SINKS = Objective(readout=ReadoutSpec(over="all")), Objective(readout=ReadoutSpec(over="sinks"))
CLOZE = Objective(kind="cloze")


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled for a card that is not there."""
    monkeypatch.setattr(flex, "flex_attention", in_the_open)


def in_the_open(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score_mod: Any, block_mask: BlockMask, scale: float, **rest: Any
) -> tuple[torch.Tensor, AuxOutput]:
    """FlexAttention by operations that each look at their devices; the closures of its kernel too."""
    h, q, k = (torch.arange(n, device=query.device) for n in (query.shape[1], query.shape[2], key.shape[2]))
    h, q = h[:, None, None], q[:, None]
    key, value = (of[0].repeat_interleave(len(h) // of.shape[1], 0) for of in (key, value))
    scores = score_mod(query[0] @ key.mT * scale, torch.zeros_like(q), h, q, k)
    scores = scores.masked_fill(~block_mask.mask_mod(torch.zeros_like(q), h, q, k), float("-inf"))
    assert block_mask.kv_indices.device == query.device
    return (scores.softmax(-1) @ value)[None], AuxOutput(lse=scores.logsumexp(-1)[None])


def passes(model: CTRModule, batch: Batch, objective: Objective) -> None:
    """Training with gradients of all that has any, and evaluation: on the card, without a wait."""
    batch = model.drawn(batch, objective, 3)
    model = copy.deepcopy(model).train()
    with fake_cuda() as mode:
        moved(model, mode)
        there = sent(batch, mode)
        out = model(there, objective)
        assert str(out.loss.device) == CARD
        out.loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found
        assert {str(grad.device) for grad in found.values()} == {CARD}
        with torch.no_grad():
            out = model.eval()(there, objective)
        assert str(out.loss.device) == CARD
        assert out.logits is None or str(out.logits.device) == CARD


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("examples", FORMS)
def test_a_decoder_with_all_its_biases(attention: str, examples: str) -> None:
    options: dict[str, Any] = {"temporal": True, "similarity": "vectors", "window": 2, "lora": LoraSpec(rank=2)}
    spec = tiny_spec(attention=attention, bias=BiasSpec(layers=0.5), fields={"hidden_size": 64}, **options)
    model = tiny_model(spec)
    for objective in (ALL, SINKS):
        passes(model, form_batch(examples, 4, (8, 1, 5), similarity="vectors"), objective)


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("options", [{"sinks": False}, {"gradient_checkpointing": True}, {"bias": BiasSpec(causal=False)}])
def test_other_decoders(attention: str, options: dict[str, Any]) -> None:
    spec = tiny_spec(attention=attention, fields={"hidden_size": 64}, **options)
    passes(tiny_model(spec), form_batch("per_target", 2, (6, 2)), ALL)


@pytest.mark.parametrize("kind", ["mistral", "phi3", "qwen3", "gemma", "olmo2"])
def test_backbones_of_other_kinds(kind: str) -> None:
    """One of them with a length limit, shorter than a pack and longer than each of its sequences."""
    fields: dict[str, Any] = {"hidden_size": 64} | ({"sliding_window": None} if kind == "mistral" else {})
    passes(tiny_model(tiny_spec(kind, fields=fields)), form_batch("per_user", 2, (6, 2)), ALL)


def test_a_limit_of_the_backbone_is_held_to_what_the_loader_counted() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    fields = {"hidden_size": 64, "max_position_embeddings": 50, "rope_parameters": rope}
    batch = form_batch("per_user", 2, (5, 5, 5, 5))
    assert batch.axes["span"].longest < 50 < batch.tokens
    passes(tiny_model(tiny_spec(fields=fields)), batch, ALL)


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("examples", FORMS)
def test_a_decoder_that_reads_chunks(attention: str, examples: str) -> None:
    of = sparse(summary_bias=True)
    model = a_model(of, attention, temporal=True, fields={"hidden_size": 64})
    passes(model, a_batch(of, examples, [(3, 9, 1, 1, 50, 2, 2, 7), (), (4, 4)]), ALL)


@pytest.mark.parametrize("examples", FORMS)
@pytest.mark.parametrize("name", ALL_SPECS)
def test_a_family_without_text(name: str, examples: str) -> None:
    model = family_of(name).build(ALL_SPECS[name], FACTS, 1)
    batch = ids_batch(ALL_SPECS[name], examples, [*users(2, 7), *users(1, 1, seed=3)])
    for objective in (ALL, CLOZE) if name == "srp" else (ALL,):
        passes(model, batch, objective)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda x: x + torch.ones(3), "found at least two devices"),
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x[x > 0], "nonzero"),
        (lambda x: x.cpu(), "the host waits for a copy"),
        (lambda x: torch.ones(3).to(x.device), "the host waits for a copy"),
    ],
    ids=["mixed", "item", "by truth", "to the host", "to the device"],
)
def test_what_it_is_there_to_find(wrong: Callable[[torch.Tensor], Any], says: str) -> None:
    with fake_cuda() as mode, pytest.raises((RuntimeError, AssertionError, DataDependentOutputException), match=says):
        wrong(mode.from_tensor(torch.ones(3)).to(CARD, non_blocking=True))
