"""What is read out of a model between steps: the share of attention that goes to sinks, gamma, and FLOPs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from ctrsink.attention.kinds import PAD, PREFIX, SINK
from ctrsink.attention.rule_dense import visible
from ctrsink.config.model import BiasSpec, LoraSpec, TargetSpec
from ctrsink.config.stages import Objective, ReadoutSpec
from ctrsink.families.decoder.model import BACKENDS, CTRModel
from ctrsink.families.parameters import set_trainable
from ctrsink.sequences.batch import Batch
from tests.builders import form_batch, layout_of, random_batch, tiny_model, tiny_spec
from tests.padded import padded
from tests.test_flex import EXAMPLES

close = torch.testing.assert_close


def dense_shares(model: CTRModel, batch: Batch, objective: Objective, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """By whole [L, L] softmaxes, pair by pair: in each layer, of what those asked give to other events, what sinks get."""
    real = AttentionInterface()[BACKENDS["sdpa"]]
    of = padded(batch)
    every = torch.arange(of.kinds.shape[1]).expand_as(of.kinds)
    mask = visible(of, every, objective.readout.through_sinks, model.window)
    shares: list[float] = []

    def watching(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        axis = kwargs["attention_inputs"].packed.sequences
        q, k = (axis.pad(x[0].transpose(0, 1), of.kinds.shape[1]).transpose(1, 2) for x in (query, key))
        logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) * kwargs["scaling"]
        per_head = []
        for head in range(q.shape[1]):
            to_sinks = to_history = 0.0
            for row in range(len(of.kinds)):
                for slot, at in enumerate(of.asked[row].tolist()):
                    if not of.asked_valid[row, slot]:
                        continue
                    line = logits[row, head, at].clone()
                    if model.temporal:
                        times = of.asked_times[row : row + 1, slot : slot + 1], of.sink_times[row : row + 1]
                        bias = model.temporal[module.layer_idx](*times)[0, head, 0]
                        for sink, column in enumerate(of.sinks[row].tolist()):
                            line[column] += bias[sink] * of.sink_valid[row, sink]
                    weights = line.masked_fill(~mask[row, at], float("-inf")).softmax(0).tolist()
                    for column, weight in enumerate(weights):
                        kind, other = int(of.kinds[row, column]), of.events[row, column] != of.events[row, at]
                        if other and kind not in (PAD, PREFIX):
                            to_history += weight
                            to_sinks += weight * (kind == SINK)
            per_head.append(to_sinks / to_history)
        shares.append(sum(per_head) / len(per_head))
        return real(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, BACKENDS["sdpa"], watching)
    with torch.no_grad():
        model(batch, objective)
    monkeypatch.undo()
    return shares


@pytest.mark.parametrize("over", ["all", "sinks"])
@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize(
    "options",
    [{}, {"temporal": True}, {"window": 2}, {"lora": LoraSpec(rank=2), "kv_heads": 1, "temporal": True, "window": 3}],
    ids=lambda o: "+".join(o) or "plain",
)
def test_share_of_sinks_is_that_of_the_dense_form(
    options: dict[str, Any], examples: str, over: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tiny_spec(**options, bias=BiasSpec(layers=0.5, gamma=2.0)))
    torch.manual_seed(3)
    for parameter in model.temporal.parameters():
        parameter.data.normal_()
    batch, objective = form_batch(examples, 4, (8, 1, 4)), Objective(readout=ReadoutSpec(over=over))
    found = model.look(batch, objective, model)
    expected = dense_shares(model, batch, objective, monkeypatch)
    assert found.keys() == {"gamma/layer00", "sink_attention/layer00", "sink_attention/layer01"}
    assert found["gamma/layer00"] == 2.0
    close([found["sink_attention/layer00"], found["sink_attention/layer01"]], expected, atol=1e-5, rtol=1e-5)
    if over == "sinks":
        assert expected == pytest.approx([1.0, 1.0])
    else:
        assert all(0 < share < 1 for share in expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("over", ["all", "sinks"])
@pytest.mark.parametrize("backend", ["flex", "blocks"])
def test_all_backends_tell_the_same(backend: str, over: Any) -> None:
    options: dict[str, Any] = {"temporal": True, "window": 3, "fields": {"hidden_size": 64}}
    models = [tiny_model(tiny_spec(attention=name, **options)) for name in ("sdpa", backend)]
    torch.manual_seed(3)
    for parameter in models[0].temporal.parameters():
        parameter.data.normal_()
    models[1].load_state_dict(models[0].state_dict())
    batch, objective = form_batch("per_user", 4, (8, 1, 4)), Objective(readout=ReadoutSpec(over=over))
    close(models[1].look(batch, objective, models[1]), models[0].look(batch, objective, models[0]), atol=1e-5, rtol=1e-5)


def test_the_temporal_bias_moves_the_share() -> None:
    model = tiny_model(tiny_spec(temporal=True))
    batch = random_batch(4, layout_of(), (8, 4))
    before = model.look(batch, Objective(), model)["sink_attention/layer00"]
    for bias in model.temporal:
        bias.get_parameter("slope").data.fill_(5.0)
    assert model.look(batch, Objective(), model)["sink_attention/layer00"] > before + 0.05


def test_a_probe_leaves_no_trace() -> None:
    """Neither gradients nor random numbers nor the mode of training change, and what a step computes afterwards is the same."""
    model = tiny_model(tiny_spec(fields={"attention_dropout": 0.3})).train()
    batch = random_batch(4, layout_of(), (8, 4))

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        model(batch, Objective()).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.manual_seed(1)
    expected = step()
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    first = model.look(batch, Objective(), model)
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert torch.equal(step(), expected)
    assert model.look(batch, Objective(), model) == first
    assert not any(bias._forward_pre_hooks for bias in model.biases)


def test_without_sinks_or_history_there_is_no_share() -> None:
    plain = tiny_model(tiny_spec(sinks=False))
    assert plain.look(random_batch(4, layout_of(signals=()), (8,)), Objective(), plain) == {}
    model = tiny_model(tiny_spec())
    assert model.look(random_batch(4, layout_of("per_target"), (1,)), Objective(), model).keys() == {
        "gamma/layer00",
        "gamma/layer01",
    }


@given(
    st.integers(0, 2**32),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from(EXAMPLES),
    st.booleans(),
    st.sampled_from([None, 1, 2, 4]),
)
@settings(max_examples=60)
def test_pairs_are_counted_as_they_are_seen(
    seed: int, events: list[int], examples: str, sinks_only: bool, window: int | None
) -> None:
    batch = form_batch(examples, seed, tuple(events), window=window)
    of = padded(batch)
    every = torch.arange(of.kinds.shape[1]).expand_as(of.kinds)
    seen = visible(of, every, sinks_only, window)[of.kinds != PAD]
    assert batch.costs["pairs_through_sinks" if sinks_only else "pairs"] == int(seen.sum())


def test_a_step_costs_by_what_is_trained() -> None:
    """A Llama of two layers of 32: q and o 32 x 32, k and v 32 x 16, three of 32 x 48."""
    model, batch = tiny_model(tiny_spec(lora=LoraSpec(rank=2))), random_batch(2, layout_of(), (5, 3))
    pairs = batch.costs["pairs"]
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    lora = 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    costs = {
        ("head",): (2 * weights + 2 * lora, 4),
        ("sink", "head"): (4 * weights + 4 * lora, 12),
        ("lora",): (4 * weights + 6 * lora, 12),
        ("backbone",): (6 * weights + 4 * lora, 12),
    }
    for trainable, (per_token, per_pair) in costs.items():
        set_trainable(model, trainable)  # pyright: ignore[reportArgumentType]
        found = model.flop_count(Objective())(batch)
        assert (found.matrices, found.attention) == (per_token * batch.tokens, per_pair * pairs * 32 * 2)
        assert found.total == found.matrices + found.attention
        through = model.flop_count(Objective(readout=ReadoutSpec(over="sinks")))(batch)
        assert through == (found.matrices, per_pair * batch.costs["pairs_through_sinks"] * 32 * 2)
        assert through.attention < found.attention
    told = tiny_model(tiny_spec(target=TargetSpec(signals=("item_mean",))))
    set_trainable(told, ("head",))
    # What targets are told lies below the backbone.
    assert told.flop_count(Objective())(batch).matrices == 4 * weights * batch.tokens
