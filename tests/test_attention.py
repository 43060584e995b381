"""The sink-rows form of attention against a dense reference written out position by position; what may influence what."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface

from ctrsink.attention.kinds import FEEDBACK, PREFIX, SINK, TEXT
from ctrsink.attention.packed import Padded
from ctrsink.attention.rule_dense import target_rows, visible
from ctrsink.config.model import BiasSpec, SinkSpec, TargetSpec
from ctrsink.config.stages import Objective, ReadoutSpec
from ctrsink.families.decoder.bias import InterSinkBias
from ctrsink.families.decoder.model import CTRModel
from ctrsink.sequences.batch import Batch
from tests.builders import layout_of, random_batch, random_sequences, rows_of, tiny_model, tiny_spec
from tests.padded import changed, in_rows, of_targets, padded, states_of

ALL, SINKS = Objective(readout=ReadoutSpec(over="all")), Objective(readout=ReadoutSpec(over="sinks"))
OBJECTIVES = [Objective(readout=ReadoutSpec(over=over, form=form)) for over in ("all", "sinks") for form in ("attend", "pool")]
DENSE = "dense_reference"
close = torch.testing.assert_close


def plain_mask(of: Padded, sinks_only: bool, window: int | None = None) -> torch.Tensor:
    """bool [B, L, L], by the sentence of the published method: a target uses of its history the sinks only."""
    kinds, events = of.kinds.tolist(), of.events.tolist()
    b, length = of.kinds.shape
    mask = torch.zeros(b, length, length, dtype=torch.bool)
    for row in range(b):
        for i in range(length):
            for j in range(i + 1):
                own = events[row][i] == events[row][j]
                history = kinds[row][j] in (TEXT, FEEDBACK) and not own
                hidden = sinks_only and bool(of.aligned[row, i]) and history
                sibling = bool(of.candidate[row, j]) and not own
                far = window is not None and events[row][i] - events[row][j] > window and kinds[row][j] != PREFIX
                mask[row, i, j] = i == j or not (hidden or sibling or far)
    return mask


def dense_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """softmax(q k^T * scaling + bias + mask) v with a whole [B, H, L, L] bias; the mask is the test's own."""
    given = kwargs["attention_inputs"]
    axis, length = given.packed.sequences, given.padded.kinds.shape[1]
    query, key, value = (axis.pad(x[0].transpose(0, 1), length).transpose(1, 2) for x in (query, key, value))
    b, heads, _, _ = query.shape
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    bias = torch.zeros(b, length, length)
    given.followed.add(module.layer_idx)
    table = given.tables.pop(module.layer_idx, None)
    if table is not None:
        pieces = []
        for row in range(b):
            at = given.padded.sinks[row][given.padded.sink_valid[row]]
            chosen = table[row, : len(at), : len(at)]
            pieces.append(torch.zeros(length, length).index_put((at[:, None], at[None, :]), chosen))
        bias = torch.stack(pieces)
    bias = bias[:, None].expand(b, heads, length, length)
    if module.layer_idx in given.at_asked:
        bias = bias + dense_at_asked(given.padded, given.at_asked[module.layer_idx])
    logits = query @ key.transpose(2, 3) * scaling + bias
    weights = logits.masked_fill(~module.plain_mask[:, None], float("-inf")).softmax(-1)
    return axis.pack((weights @ value).transpose(1, 2))[None], None


def dense_at_asked(of: Padded, table: torch.Tensor) -> torch.Tensor:
    """The bias [B, H, M, K] of those asked at the sinks, in its places of [B, H, L, L]."""
    length = of.kinds.shape[1]
    rows = nn.functional.one_hot(of.asked, length).float() * of.asked_valid[:, :, None]
    columns = nn.functional.one_hot(of.sinks, length).float() * of.sink_valid[:, :, None]
    return torch.einsum("brl,bhrk,bkm->bhlm", rows, table, columns)


AttentionInterface.register(DENSE, dense_attention)


def run(model: CTRModel, batch: Batch, objective: Objective) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of the valid targets and the gradients of their loss."""
    model.zero_grad(set_to_none=True)
    out = model(batch, objective)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.logits[batch.targets.counted].detach(), grads


def run_dense(model: CTRModel, batch: Batch, objective: Objective) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    dense = copy.deepcopy(model)
    dense.backbone.config._attn_implementation = DENSE  # pyright: ignore[reportAttributeAccessIssue]
    readout = objective.readout
    mask = plain_mask(padded(batch), readout.over == "sinks" and readout.form == "attend", model.window)
    for layer in attention_layers(dense):
        layer.self_attn.plain_mask = mask
    return run(dense, batch, objective)


def attention_layers(model: CTRModel) -> list[nn.Module]:
    return list(model.backbone.layers)  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda of: f"{of.readout.over}-{of.readout.form}")
@pytest.mark.parametrize(("kind", "kv_heads"), [("llama", 4), ("qwen2", 2), ("qwen3", 1)])
def test_results_and_gradients_equal_the_dense_form(kind: str, kv_heads: int, objective: Objective) -> None:
    model = tiny_model(tiny_spec(kind, kv_heads, bias=BiasSpec(layers=1.0, gamma=3.0)))
    batch = random_batch(3, layout_of(), (8, 1, 4, 2))
    logits, grads = run(model, batch, objective)
    expected, expected_grads = run_dense(model, batch, objective)
    close(logits, expected, atol=1e-5, rtol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        close(grad, expected_grads[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    # The bias matters here: without it the results are others.
    for bias in model.biases:
        bias.get_parameter("gamma").data.zero_()
    assert (run(model, batch, objective)[0] - logits).abs().max() > 1e-3


@settings(max_examples=12)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.sampled_from(["per_user", "per_target"]),
    st.sampled_from([ALL, SINKS]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0.5, 1.0]),
)
def test_any_batch_equals_the_dense_form(
    seed: int, events: list[int], examples: str, objective: Objective, kv_heads: int, share: float
) -> None:
    """K = 0, 1 and many sinks, in one batch or alone; every share of layers."""
    model = tiny_model(tiny_spec(kv_heads=kv_heads, bias=BiasSpec(layers=share, gamma=2.0)))
    batch = random_batch(seed, layout_of(examples), tuple(events))
    close(run(model, batch, objective)[0], run_dense(model, batch, objective)[0], atol=1e-5, rtol=1e-5)


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=20)
def test_visibility_is_the_written_rule(seed: int, per_user: bool) -> None:
    batch = random_batch(seed, layout_of("per_user" if per_user else "per_target"), (5, 1, 3))
    of = padded(batch)
    every = torch.arange(of.kinds.shape[1]).expand_as(of.kinds)
    for sinks_only in (True, False):
        for window in (None, 2):
            assert torch.equal(visible(of, every, sinks_only, window), plain_mask(of, sinks_only, window))
    assert target_rows(of, False, None) is None


def bias_by_loop(module: InterSinkBias, sinks: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The formula of the inter-sink bias, one pair at a time."""
    b, k, d = sinks.shape
    out, width = torch.zeros(b, k, k, dtype=sinks.dtype), d // module.heads
    for row in range(b):
        x = module.norm(sinks[row])
        q, key = module.query(x), module.key(x)
        for i in range(k):
            seen = [j for j in range(i + 1) if valid[row, j]] if module.causal else list(range(k))
            if not valid[row, i]:
                continue
            for head in range(module.heads):
                part = slice(head * width, (head + 1) * width)
                weights = torch.stack([q[i, part] @ key[j, part] for j in seen]).div(width**0.5).softmax(0)
                for j, weight in zip(seen, weights, strict=True):
                    out[row, i, j] += module.gamma[0] * weight / module.heads
    return out * (valid[:, :, None] & valid[:, None, :])


@pytest.mark.parametrize("causal", [True, False])
def test_the_bias_is_the_formula(causal: bool) -> None:
    torch.manual_seed(0)
    module = InterSinkBias(12, 3, gamma=1.7, causal=causal)
    sinks = torch.randn(3, 5, 12)
    valid = torch.tensor([[True] * 5, [True, True, True, False, False], [False] * 5])
    close(module(sinks, valid), bias_by_loop(module, sinks, valid), atol=1e-6, rtol=1e-5)


def test_the_causal_bias_is_a_distribution_over_earlier_sinks() -> None:
    module = InterSinkBias(8, 2, gamma=1.0)
    table = module(torch.randn(2, 4, 8), torch.tensor([[True] * 4, [True, True, False, False]]))
    close(table.sum(-1), torch.tensor([[1.0] * 4, [1.0, 1.0, 0.0, 0.0]]))
    assert not table.triu(1).any()


def test_gradients_of_the_bias_are_exact() -> None:
    torch.manual_seed(0)
    module = Double(InterSinkBias(4, 2, gamma=0.7).double())
    valid = torch.tensor([[True, True, True], [True, False, False]])
    sinks = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = (sinks, *module.inner.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: module(x, valid), inputs, eps=1e-3, atol=1e-3, rtol=1e-2)


class Double(nn.Module):
    """gradcheck needs double precision all the way."""

    def __init__(self, inner: InterSinkBias) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, sinks: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return self.inner(sinks, valid).double()


@pytest.fixture(params=[ALL, SINKS], ids=["all", "sinks"])
def objective(request: pytest.FixtureRequest) -> Objective:
    return request.param


def states(model: CTRModel, batch: Batch, objective: Objective) -> torch.Tensor:
    with torch.no_grad():
        return states_of(model, batch, objective)


def test_nothing_before_a_changed_token_moves(objective: Objective) -> None:
    model, batch = tiny_model(tiny_spec()), random_batch(1, layout_of(), (6, 6))
    before = states(model, batch, objective)
    of = padded(batch)
    length = int((of.kinds[0] != 0).sum())
    for at in range(length):
        ids, signals = batch.inputs["input_ids"].clone(), batch.inputs["signals"].clone()
        if of.kinds[0, at] == SINK:
            slot = of.sinks[0].tolist().index(at)  # of the first sequence, as the position is: its number in the batch
            signals[slot] = (signals[slot] + 1) % 10
        else:
            ids[at] = (ids[at] + 1) % 97
        after = states(model, changed(batch, input_ids=ids, signals=signals), objective)
        assert torch.equal(after[0, :at], before[0, :at])
        assert (after[0, at] - before[0, at]).abs().max() > 1e-4
        assert torch.equal(after[1], before[1])


def test_neither_padding_nor_neighbours_change_a_row(objective: Objective) -> None:
    model, events = tiny_model(tiny_spec()), (7, 1, 3, 5)
    sequences = random_sequences(4, layout_of(), events)
    together = rows_of(sequences)
    lengths = {padded(together).kinds.shape[1]}
    with torch.no_grad():
        logits = model(together, objective).logits
        for row in range(len(events)):
            alone = rows_of(sequences, [row])
            lengths.add(padded(alone).kinds.shape[1])
            own = together.targets.users == row
            close(model(alone, objective).logits, logits[own], atol=1e-5, rtol=1e-5)
    assert len(lengths) > 2  # the backend pads each of them otherwise


def test_sequences_in_another_order_give_the_same_results(objective: Objective) -> None:
    model, sequences = tiny_model(tiny_spec()), random_sequences(4, layout_of(), (7, 1, 3, 5))
    order = [2, 0, 3, 1]
    batch, permuted = rows_of(sequences), rows_of(sequences, order)
    with torch.no_grad():
        loss, logits, _ = model(batch, objective)
        other, moved, _ = model(permuted, objective)
    close(of_targets(permuted, moved), of_targets(batch, logits)[order], atol=1e-5, rtol=1e-5)
    close(other, loss)


def test_gamma_zero_is_no_bias(objective: Objective) -> None:
    model, batch = tiny_model(tiny_spec()), random_batch(2, layout_of(), (6, 3))
    plain = tiny_model(tiny_spec().model_copy(update={"bias": None}))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("biases")})
    for bias in model.biases:
        bias.get_parameter("gamma").data.zero_()
    mine, expected = states(model, batch, objective), states(plain, batch, objective)
    inside = padded(batch).kinds != 0
    close(mine[inside], expected[inside], atol=1e-6, rtol=1e-6)


def input_gradient(model: CTRModel, batch: Batch, objective: Objective) -> torch.Tensor:
    """Norm of the gradient of one readout's logit with respect to each input vector, [L]."""
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs["inputs_embeds"].retain_grad()
        seen.append(kwargs["inputs_embeds"])

    handle = model.backbone.register_forward_pre_hook(keep, with_kwargs=True)
    last = int((batch.targets.users == 0).sum()) - 1  # of the first sequence
    model(batch, objective).logits[last].backward()
    handle.remove()
    assert seen[0].grad is not None
    return in_rows(batch, seen[0].grad[0])[0].norm(dim=-1)


@pytest.mark.parametrize("examples", ["per_target", "per_user"])
def test_under_readout_sinks_a_target_uses_its_history_through_sinks_only(examples: str) -> None:
    """In one layer there is no way around: the text of the history gives nothing, its sinks do."""
    batch = random_batch(6, layout_of(examples), (6,))
    kinds, events = padded(batch).kinds[0], padded(batch).events[0]
    target = events == events.max()
    history = ((kinds == TEXT) | (kinds == FEEDBACK)) & ~target
    gradient = input_gradient(tiny_model(tiny_spec(layers=1)), batch, SINKS)
    assert history.any()
    assert not gradient[history].any()
    assert (gradient[kinds == SINK] > 0).all()
    assert (gradient[kinds == PREFIX] > 0).all()
    assert (gradient[target & (kinds == TEXT)] > 0).all()
    # With two layers the sinks have read the text; with readout over all nothing is hidden.
    assert (input_gradient(tiny_model(tiny_spec(layers=2)), batch, SINKS)[history] > 0).all()
    assert (input_gradient(tiny_model(tiny_spec(layers=1)), batch, ALL)[history] > 0).all()


def test_no_layer_computes_on_padding(objective: Objective) -> None:
    model, batch = tiny_model(tiny_spec()), random_batch(6, layout_of(), (3, 8, 1))
    seen: list[torch.Size] = []
    for layer in attention_layers(model):
        layer.mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    model(batch, objective)
    assert seen == [torch.Size([1, batch.tokens, 32])] * 2
    assert batch.tokens < padded(batch).kinds.numel()


@pytest.mark.parametrize(
    ("categories", "numbers", "target"),
    [
        (("previous_gap",), (), None),
        (("previous_gap", "random"), (), None),
        ((), ("deviation",), TargetSpec(signals=("weekday",))),
        (("feedback", "hour"), ("deviation", "item_mean"), TargetSpec(signals=("hour", "item_mean", "weekday", "item_count"))),
    ],
)
def test_gradients_reach_every_part(
    categories: tuple[str, ...], numbers: tuple[str, ...], target: TargetSpec | None, objective: Objective
) -> None:
    spec = tiny_spec(layers=3, bias=BiasSpec(layers=0.67), target=target, similarity="vectors" if target else None)
    sinks = SinkSpec(signals=(*categories, *numbers), buckets=24, embedding_size=8)
    model = tiny_model(spec.model_copy(update={"sinks": sinks}))
    layout = layout_of(
        signals=categories,
        numbers=numbers,
        target_signals=target.categories if target else (),
        target_numbers=target.numbers if target else (),
        similarity=spec.similarity,
    )
    _, grads = run(model, random_batch(5, layout, (8, 4)), objective)
    assert grads.keys() == dict(model.named_parameters()).keys()
    for name, grad in grads.items():
        if name.startswith("biases") and name.endswith("key.bias"):
            continue  # the same addition to all scores of a row: softmax does not see it
        assert grad.abs().max() > 1e-8, name


def test_a_single_sink_teaches_the_scale_only() -> None:
    model = tiny_model(tiny_spec(layers=2, bias=BiasSpec(layers=0.5)))
    _, grads = run(model, random_batch(5, layout_of(targets=1), (2,)), ALL)
    assert grads["biases.0.gamma"].abs().max() > 1e-8
    assert grads["biases.0.query.weight"].abs().max() < 1e-8


def test_gradient_checkpointing_changes_no_gradient(objective: Objective) -> None:
    batch = random_batch(5, layout_of(), (8, 4))
    plain, saving = tiny_model(tiny_spec()).train(), tiny_model(tiny_spec(gradient_checkpointing=True)).train()
    assert saving.backbone.is_gradient_checkpointing
    logits, grads = run(plain, batch, objective)
    other, recomputed = run(saving, batch, objective)
    close(other, logits)
    assert recomputed.keys() == grads.keys()
    for name in grads:
        close(recomputed[name], grads[name])


def test_a_backend_that_drops_the_bias_is_an_error() -> None:
    model = tiny_model(tiny_spec())
    model.backbone.config._attn_implementation = "sdpa"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RuntimeError, match="the attention of 2 of 2 layers knew nothing of sinks"):
        model(random_batch(5, layout_of(), (4,)), ALL)


def test_a_layer_that_drops_keywords_is_an_error() -> None:
    model = tiny_model(tiny_spec())
    layer = attention_layers(model)[1]
    forward = layer.forward
    layer.forward = lambda *args, attention_inputs=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(RuntimeError, match="the attention of 1 of 2 layers knew nothing of sinks"):
        model(random_batch(5, layout_of(), (4,)), ALL)


def test_a_copy_of_a_model_has_a_bias_of_its_own() -> None:
    model, batch = tiny_model(tiny_spec()), random_batch(5, layout_of(), (8, 4))
    before = states(model, batch, ALL)
    twin = copy.deepcopy(model)
    for bias in model.biases:
        bias.get_parameter("gamma").data.fill_(9.0)
    assert torch.equal(states(twin, batch, ALL), before)
    assert not torch.equal(states(model, batch, ALL), before)
