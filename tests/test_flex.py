"""The flex backend computes what the sdpa backend computes: results, gradients, and who sees whom."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention

from ctrsink.batch import Batch
from ctrsink.config.model import BiasSpec
from ctrsink.config.stages import ReadoutSpec
from ctrsink.model.ctr import CTRModel
from tests.builders import layout_of, random_batch, tiny_model, tiny_spec

ALL, SINKS = ReadoutSpec(over="all"), ReadoutSpec(over="sinks")
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


def run(model: CTRModel, batch: Batch, readout: ReadoutSpec) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, logits = model(batch, readout)
    loss.backward()
    return logits[batch.readout_valid].detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("readout", [ALL, SINKS], ids=["all", "sinks"])
@pytest.mark.parametrize(("temporal", "window"), [(False, None), (True, None), (True, 2)])
def test_results_and_gradients_equal_those_of_sdpa(
    examples: str, readout: ReadoutSpec, temporal: bool, window: int | None
) -> None:
    sdpa, other = pair(temporal=temporal, window=window, bias=BiasSpec(layers=0.5, gamma=2.0))
    batch = random_batch(4, layout_of(examples), (8, 1, 4))
    logits, grads = run(other, batch, readout)
    expected, expected_grads = run(sdpa, batch, readout)
    close(logits, expected, atol=1e-5, rtol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        close(grad, expected_grads[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert grads["biases.0.gamma"].abs().max() > 1e-4
