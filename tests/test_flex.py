"""The flex backend computes what the sdpa backend computes: results, gradients, and who sees whom."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from ctrsink.attention import flex
from ctrsink.attention.kinds import PAD
from ctrsink.attention.packed import Packed, Padded
from ctrsink.attention.rule_dense import visible
from ctrsink.attention.rule_packed import Sight
from ctrsink.config.model import BiasSpec
from ctrsink.config.stages import Objective, ReadoutSpec
from ctrsink.errors import InputError
from ctrsink.families.decoder.build import build_model
from ctrsink.families.decoder.model import CTRModel
from ctrsink.sequences.batch import Batch
from tests.builders import VOCABULARY, form_batch, layout_of, random_batch, tiny_model, tiny_spec

ALL, SINKS = Objective(readout=ReadoutSpec(over="all")), Objective(readout=ReadoutSpec(over="sinks"))
EXAMPLES = ["per_target", "per_request", "per_user"]
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def unfused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch refuses gradients on a CPU because its fused kernel has none there; the unfused form has them."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *args: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def pair(precision: str = "fp32", **options: Any) -> tuple[CTRModel, CTRModel]:
    """One model with random temporal bias on either backend."""
    fields: dict[str, Any] = {"hidden_size": 64}
    models = [tiny_model(tiny_spec(attention=a, fields=fields, **options), precision=precision) for a in ("sdpa", "flex")]
    torch.manual_seed(3)
    for parameter in models[0].temporal.parameters():
        parameter.data.normal_()
    models[1].load_state_dict(models[0].state_dict())
    return models[0], models[1]


def run(model: CTRModel, batch: Batch, objective: Objective) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = model(batch, objective)
    out.loss.backward()
    return out.logits[batch.targets.counted].detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("objective", [ALL, SINKS], ids=["all", "sinks"])
@pytest.mark.parametrize(
    ("temporal", "similarity", "window"),
    [(False, None, None), (True, None, None), (False, "vectors", None), (True, "vectors", 2)],
)
def test_results_and_gradients_equal_those_of_sdpa(
    examples: str, objective: Objective, temporal: bool, similarity: str | None, window: int | None
) -> None:
    sdpa, other = pair(temporal=temporal, similarity=similarity, window=window, bias=BiasSpec(layers=0.5, gamma=2.0))
    batch = form_batch(examples, 4, (8, 1, 5), similarity=similarity)
    logits, grads = run(other, batch, objective)
    expected, expected_grads = run(sdpa, batch, objective)
    close(logits, expected, atol=1e-5, rtol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        close(grad, expected_grads[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert grads["biases.0.gamma"].abs().max() > 2e-5  # more than the tolerance


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.sampled_from(EXAMPLES),
    st.sampled_from([ALL, SINKS]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, 1, 3]),
)
def test_any_batch_equals_sdpa(
    seed: int, events: list[int], examples: str, objective: Objective, kv_heads: int, window: int | None
) -> None:
    """No sink, one and many, in one batch or alone; heads that share keys."""
    sdpa, other = pair(
        temporal=True, similarity="vectors", window=window, kv_heads=kv_heads, bias=BiasSpec(layers=1.0, gamma=2.0)
    )
    batch = form_batch(examples, seed, tuple(events), similarity="vectors")
    with torch.no_grad():
        close(other(batch, objective).logits, sdpa(batch, objective).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"sinks": False}, {"bias": BiasSpec(causal=False)}, {"gradient_checkpointing": True}])
def test_other_models_equal_sdpa(options: dict[str, Any]) -> None:
    sdpa, other = (model.train() for model in pair(**options))
    batch = form_batch("per_target", 2, (6, 2))
    logits, grads = run(other, batch, ALL)
    expected, expected_grads = run(sdpa, batch, ALL)
    close(logits, expected, atol=1e-5, rtol=1e-5)
    close(grads, expected_grads, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_within_its_digits_of_sdpa() -> None:
    sdpa, other = pair("bf16", temporal=True)
    batch = form_batch("per_user", 2, (6, 2))
    close(run(other, batch, ALL)[0], run(sdpa, batch, ALL)[0], atol=0.05, rtol=0.05)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from(EXAMPLES), st.booleans(), st.sampled_from([None, 1, 2]), st.sampled_from([2, 5, 16])
)
def test_who_sees_whom_is_the_rule_by_pair_and_by_block(
    seed: int, examples: str, sinks_only: bool, window: int | None, size: int
) -> None:
    batch = form_batch(examples, seed, (9, 1, 4, 6))
    packed = Packed.of(batch)
    of = Padded.of(packed)
    every = torch.arange(of.kinds.shape[1]).expand_as(of.kinds)
    padded = torch.block_diag(*visible(of, every, sinks_only, window).float()).bool()
    places = (of.kinds != PAD).flatten().nonzero()[:, 0]
    expected = padded[places][:, places]
    sight = Sight.of(packed, sinks_only, window)
    sees, index = sight.rule(), torch.arange(len(expected))
    assert torch.equal(sees(None, None, index[:, None], index[None, :]), expected)
    blocks = sight.block_mask(sees, size)
    assert blocks.full_kv_num_blocks is not None
    partial = chosen(blocks.kv_num_blocks, blocks.kv_indices, size)[: len(index), : len(index)]
    whole = chosen(blocks.full_kv_num_blocks, blocks.full_kv_indices, size)[: len(index), : len(index)]
    assert not (partial & whole).any()
    assert torch.equal(whole | (partial & expected), expected)
    # Sequences in other blocks cost nothing, nor does what comes later.
    assert (partial | whole).float().mean() < 0.75


def chosen(counts: torch.Tensor | None, indices: torch.Tensor | None, size: int) -> torch.Tensor:
    """bool [Q * size, K * size] of blocks that are listed."""
    assert counts is not None
    assert indices is not None
    listed = torch.arange(indices.shape[-1]) < counts[0, 0][:, None]
    grid = torch.zeros(listed.shape, dtype=torch.bool).scatter(1, indices[0, 0].long(), listed)
    return grid.repeat_interleave(size, 0).repeat_interleave(size, 1)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                # An expanded tensor holds no more than what it expands.
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_nothing_outside_the_kernel_is_as_large_as_one_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **rest: Any) -> tuple[torch.Tensor, Any]:
        return query * 1.0, flex_attention.AuxOutput(lse=torch.zeros(query.shape[:3]))

    monkeypatch.setattr(flex, "flex_attention", no_kernel)
    model = tiny_model(tiny_spec(attention="flex", temporal=True, window=4, layers=1, fields={"hidden_size": 64}))
    batch = random_batch(1, layout_of(history=250, targets=3), (250, 250, 250))
    with Largest() as seen:
        model(batch, SINKS).loss.backward()
    b, length = Padded.of(Packed.of(batch)).kinds.shape
    assert 0 < seen.elements < b * length * length / 2


def test_what_the_kernel_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="flex needs heads of at least 16 dimensions, the backbone's have 8; use sdpa"):
        build_model(tiny_spec(attention="flex"), VOCABULARY, 1)
    for name in ("flex", "blocks"):
        dropout = tiny_spec(attention=name, fields={"hidden_size": 64, "attention_dropout": 0.1})
        with pytest.raises(InputError, match=rf"model\.attention: {name} has no dropout of attention weights.*is 0\.1: set"):
            build_model(dropout, VOCABULARY, 1)
