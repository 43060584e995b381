"""What only a CUDA device can show of parts; whole runs on it are in test_gpu_gate."""

from typing import Any

import pytest
import torch

from ctrsink.config.model import BiasSpec
from ctrsink.config.stages import Objective, ReadoutSpec
from tests.builders import layout_of, random_batch, tiny_model, tiny_spec


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
@pytest.mark.parametrize("over", ["all", "sinks"])
@pytest.mark.parametrize("window", [None, 2])
def test_flex_is_sdpa_on_cuda_forward_and_backward(over: Any, window: int | None, precision: str, tolerance: float) -> None:
    """Batches of one block and of many, whose tokens fill none of them: every size is another to the compiled kernel."""
    options: dict[str, Any] = {"temporal": True, "window": window, "bias": BiasSpec(layers=0.5, gamma=2.0)}
    models = [
        tiny_model(tiny_spec(attention=name, fields={"hidden_size": 64}, **options), precision=precision).cuda()
        for name in ("sdpa", "flex")
    ]
    torch.manual_seed(3)
    for parameter in models[0].temporal.parameters():
        parameter.data.normal_()
    models[1].load_state_dict(models[0].state_dict())
    for events in ((8, 1, 4), (9,) * 30, (3,), (1,), (7,) * 41):
        batch = random_batch(4, layout_of(), events).to("cuda")
        found: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
        for model in models:
            model.zero_grad(set_to_none=True)
            loss, logits, _ = model(batch, Objective(readout=ReadoutSpec(over=over)))
            (loss / batch.impressions).backward()
            grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
            found.append((logits[batch.targets.counted].detach(), grads))
        torch.testing.assert_close(found[1][0], found[0][0], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(found[1][1], found[0][1], atol=tolerance, rtol=tolerance)
