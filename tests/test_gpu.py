"""What only a CUDA device can show: the same run as on the CPU, within the tolerance of its arithmetic."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._dynamo.utils import counters

from ctrsink.config.model import BiasSpec
from ctrsink.config.stages import Objective, ReadoutSpec
from ctrsink.train.feed import fed
from ctrsink.train.observe.telemetry import read_metrics
from tests.builders import layout_of, random_batch, tiny_model, tiny_spec
from tests.chunked_fixtures import a_batch, a_model, sparse
from tests.chunked_fixtures import run as by_chunks
from tests.runs import prepared_data, run_tree

PLAIN: dict[str, Any] = {"model": {"backbone": {"config": {"attention_dropout": 0.0}}}}


def losses(tree: dict[str, Any], folder: Path) -> list[float]:
    """Train in a process of its own: a process keeps the accelerator that DeepSpeed chose first."""
    path = folder / f"{Path(tree['run_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    subprocess.run([sys.executable, "-m", "ctrsink", "train", "--config", str(path)], check=True)
    return [row["loss"] for row in read_metrics(tree["run_dir"])]


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.05)])
def test_losses_on_cuda_are_those_of_the_cpu(tmp_path: Path, precision: str, tolerance: float) -> None:
    data = prepared_data(str(tmp_path / "data"))
    cuda = {"runtime": {"kind": "local", "device": "cuda"}, "train": {"precision": precision}}
    found = losses(run_tree(data, str(tmp_path / "cuda"), **PLAIN, **cuda), tmp_path)
    expected = losses(run_tree(data, str(tmp_path / "cpu"), **PLAIN), tmp_path)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


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


@pytest.mark.gpu
@pytest.mark.parametrize("over", ["all", "sinks"])
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_the_host_waits_for_nothing_in_a_forward_and_a_backward_pass(attention: str, over: Any) -> None:
    """What test_fake_cuda shows without a card; copies of batches are among it."""
    options: dict[str, Any] = {"temporal": True, "window": 2, "bias": BiasSpec(layers=0.5)}
    model = tiny_model(tiny_spec(attention=attention, fields={"hidden_size": 64}, **options)).cuda()
    batches = [random_batch(seed, layout_of(), (8, 1, 4)) for seed in range(3)]
    objective = Objective(readout=ReadoutSpec(over=over))
    for batch in fed(batches, "cuda"):  # compiles, and makes what is kept
        model(batch, objective).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in fed(batches, "cuda"):
            model(batch, objective).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_batches_arrive_on_cuda_as_they_were() -> None:
    """While the card is busy with something else."""
    batches = [random_batch(seed, layout_of(), (8, 1, 4) * 20) for seed in range(8)]
    busy = torch.randn(4096, 4096, device="cuda")
    for given, batch in zip(batches, fed(batches, "cuda"), strict=True):
        busy = busy @ busy / 4096
        for name, value in given.inputs.items():
            assert torch.equal(batch.inputs[name].cpu(), value)


@pytest.mark.gpu
def test_flex_compiles_two_graphs_for_each_type_on_cuda() -> None:
    torch._dynamo.reset()
    counters.clear()
    for precision in ("fp32", "bf16"):
        model = tiny_model(tiny_spec(attention="flex", temporal=True, fields={"hidden_size": 64}), precision=precision).cuda()
        for events in ((8, 1, 4), (9,) * 30, (3,), (1,), (7,) * 41):
            batch = random_batch(4, layout_of(), events).to("cuda")
            for over in ("all", "sinks"):
                model(batch, Objective(readout=ReadoutSpec(over=over))).loss.backward()
            with torch.no_grad():
                model(batch, Objective())
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_flex_by_chunks_is_sdpa_on_cuda_forward_and_backward(precision: str, tolerance: float) -> None:
    of = sparse(summary_bias=True)
    models = [a_model(of, name, precision, temporal=True, fields={"hidden_size": 64}).cuda() for name in ("sdpa", "flex")]
    for gaps in ([[60] * 300, [], [1, 86400, 3]], [[5]]):
        batch = a_batch(of, "per_user", gaps).to("cuda")
        (expected, grads), (logits, found) = (by_chunks(model, batch, Objective()) for model in models)
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(found, grads, atol=tolerance, rtol=tolerance)
