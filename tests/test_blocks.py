"""The blocks backend computes what the sdpa backend computes: results and gradients, over sequences of one block and of many."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.attention import blocks
from ctrsink.attention.packed import Packed, Padded
from ctrsink.attention.rule_dense import visible
from ctrsink.config.model import BiasSpec
from ctrsink.config.stages import Objective, ReadoutSpec
from ctrsink.families.decoder.model import CTRModel
from ctrsink.sequences.batch import Batch
from tests.builders import form_batch, layout_of, random_batch, tiny_model, tiny_spec

ALL, SINKS = Objective(readout=ReadoutSpec(over="all")), Objective(readout=ReadoutSpec(over="sinks"))
EXAMPLES = ["per_target", "per_request", "per_user"]
close = torch.testing.assert_close


@pytest.fixture(params=[4, blocks.QUERIES], ids=["many blocks", "one block"])
def queries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(blocks, "QUERIES", request.param)
    return request.param


def pair(**options: Any) -> tuple[CTRModel, CTRModel]:
    """One model with random temporal bias on either backend."""
    models = [tiny_model(tiny_spec(attention=backend, **options)) for backend in ("sdpa", "blocks")]
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
    queries: int, examples: str, objective: Objective, temporal: bool, similarity: str | None, window: int | None
) -> None:
    sdpa, ours = pair(temporal=temporal, similarity=similarity, window=window, bias=BiasSpec(layers=0.5, gamma=2.0))
    batch = form_batch(examples, 4, (8, 1, 5), similarity=similarity)
    logits, grads = run(ours, batch, objective)
    expected, expected_grads = run(sdpa, batch, objective)
    close(logits, expected, atol=1e-5, rtol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        close(grad, expected_grads[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert grads["biases.0.gamma"].abs().max() > 2e-5  # more than the tolerance


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.sampled_from(EXAMPLES),
    st.sampled_from([ALL, SINKS]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, 1, 3]),
    st.integers(1, 9),
)
def test_any_batch_and_any_size_of_block_equal_sdpa(
    seed: int, events: list[int], examples: str, objective: Objective, kv_heads: int, window: int | None, size: int
) -> None:
    sdpa, ours = pair(temporal=True, similarity="vectors", window=window, kv_heads=kv_heads, bias=BiasSpec(layers=1.0, gamma=2.0))
    batch = form_batch(examples, seed, tuple(events), similarity="vectors")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(blocks, "QUERIES", size)
        close(ours(batch, objective).logits, sdpa(batch, objective).logits, atol=1e-5, rtol=1e-5)


def test_gradients_are_exact_in_double_precision(queries: int) -> None:
    model = tiny_model(tiny_spec(attention="blocks", kv_heads=2, bias=BiasSpec(layers=0.5))).double()
    batch = form_batch("per_user", 1, (3, 2))
    made = blocks.inputs(Packed.of(batch), sinks_only=False, window=2)
    torch.manual_seed(0)
    length, slots, asked = batch.tokens, made.packed.sinks.width, made.packed.asked.width
    shapes = [(4, length, 3), (2, length, 3), (2, length, 3), (2, slots, slots), (2, 4, asked, slots)]
    given_values = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    # Entries of slots that are not valid, and of later sinks, are read by nobody: their gradient is 0 either way.
    assert torch.autograd.gradcheck(lambda *x: blocks.BlockProducts.apply(*x, 0.5, made.blocks), given_values)
    assert model.window is None


def test_bf16_is_as_near_to_fp32_as_sdpa_is() -> None:
    batch = form_batch("per_user", 2, (40, 25))
    exact = tiny_model(tiny_spec())(batch, ALL).logits.detach()
    errors = []
    for backend in ("sdpa", "blocks"):
        found = tiny_model(tiny_spec(attention=backend), precision="bf16")(batch, ALL).logits.detach()
        errors.append(float((found - exact)[batch.targets.counted].abs().mean()))
    assert errors[1] < 1.5 * errors[0]


def test_a_window_leaves_out_the_keys_that_no_query_of_a_block_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "QUERIES", 4)
    batch = random_batch(0, layout_of(history=40, targets=20), (60,))
    length = batch.tokens
    made = blocks.inputs(Packed.of(batch), sinks_only=False, window=2).blocks
    assert sum(block.hidden.numel() for block in made) < length * 30
    shown = torch.zeros(length, length, dtype=torch.bool)
    for block in made:
        columns = torch.cat([torch.arange(part.start, part.stop) for part in block.keys])
        shown[block.rows, columns] = ~block.hidden
    assert torch.equal(shown, visible(Padded.of(Packed.of(batch)), torch.arange(length)[None], False, 2)[0, :, :length])
