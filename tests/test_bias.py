"""The inter-sink bias: exact gradients in double precision, any number of sinks, independence of what does not belong to it."""

import copy

import pytest
import torch

from ctrsink.attention.kinds import PAD
from ctrsink.config.stages import Objective, ReadoutSpec
from ctrsink.families.decoder.bias import InterSinkBias
from ctrsink.families.decoder.model import CTRModel
from tests.builders import layout_of, random_batch, random_sequences, rows_of, tiny_model, tiny_spec
from tests.padded import of_targets, padded, states_of

ALL, POOL = Objective(readout=ReadoutSpec(over="all")), Objective(readout=ReadoutSpec(over="sinks", form="pool"))
HISTORY = 5
close = torch.testing.assert_close


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_gradients_are_exact(sinks: int, causal: bool) -> None:
    torch.manual_seed(0)
    module = InterSinkBias(6, 2, gamma=0.7, causal=causal).double()
    valid = torch.arange(sinks)[None] < torch.tensor([[sinks], [sinks // 2]])
    states = torch.randn(2, sinks, 6, dtype=torch.float64, requires_grad=True)
    assert module(states, valid).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x, *_: module(x, valid), (states, *module.parameters()))


def test_tables_belong_to_their_rows() -> None:
    """Other rows of a batch, their order and the number of spare slots change nothing."""
    torch.manual_seed(0)
    module = InterSinkBias(8, 2, gamma=1.3)
    valid = torch.arange(5)[None] < torch.tensor([5, 0, 1, 3])[:, None]
    states = torch.randn(4, 5, 8)
    tables = module(states, valid)
    order = torch.tensor([2, 0, 3, 1])
    close(module(states[order], valid[order]), tables[order])
    for row, count in enumerate((5, 0, 1, 3)):
        close(module(states[row : row + 1, :count], valid[row : row + 1, :count])[0], tables[row, :count, :count])
        assert not tables[row, count:].any()
        assert not tables[row, :, count:].any()


def test_gamma_zero_is_a_table_of_zeros_that_still_learns() -> None:
    module = InterSinkBias(8, 2, gamma=0.0)
    table = module(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    assert not table.any()
    table.sum().backward()
    assert module.gamma.grad is not None
    assert module.gamma.grad.abs().max() > 1


def scale(model: CTRModel, gamma: float) -> CTRModel:
    other = copy.deepcopy(model)
    for bias in other.biases:
        bias.get_parameter("gamma").data.fill_(gamma)
    return other


@torch.no_grad()
@pytest.mark.parametrize("examples", ["per_target", "per_user"])
def test_the_bias_matters_from_the_second_sink_on(examples: str) -> None:
    """K = 0 and a first sink are the plain model whatever gamma is: its row has one entry."""
    model = tiny_model(tiny_spec())
    plain, strong = scale(model, 0.0), scale(model, 30.0)
    for events in range(1, HISTORY + 2):
        batch = random_batch(7, layout_of(examples, HISTORY, 1), (events,))
        of = padded(batch)
        sinks = int(of.sink_valid.sum())
        assert sinks == min(events - 1, HISTORY) if examples == "per_target" else sinks >= events - 1
        difference = (states_of(strong, batch, ALL) - states_of(plain, batch, ALL))[of.kinds != PAD].abs().max()
        if sinks == 0:
            assert difference == 0
        else:
            assert difference > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("objective", [ALL, POOL], ids=["all", "pool"])
def test_rows_of_no_one_and_all_sinks_in_one_batch_are_what_each_is_alone(objective: Objective) -> None:
    model, events = scale(tiny_model(tiny_spec()), 3.0), (1, 2, HISTORY + 1, 3)
    sequences = random_sequences(4, layout_of("per_target", HISTORY), events)
    together = rows_of(sequences)
    assert sorted(padded(together).sink_valid.sum(1).tolist()) == [0, 1, 2, HISTORY]
    logits = of_targets(together, model(together, objective).logits)
    order = [3, 1, 0, 2]
    permuted = rows_of(sequences, order)
    close(of_targets(permuted, model(permuted, objective).logits), logits[order], atol=1e-5, rtol=1e-5)
    for row in range(len(events)):
        alone = rows_of(sequences, [row])
        close(of_targets(alone, model(alone, objective).logits), logits[row : row + 1], atol=1e-5, rtol=1e-5)
