"""How many graphs FlexAttention is compiled to over a run: torch ends a run that wants more than eight, after hours for one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention

from ctrsink.attention import flex
from ctrsink.config.model import BiasSpec, LoraSpec
from ctrsink.config.stages import Group, Objective, ReadoutSpec
from ctrsink.families.parameters import set_trainable
from tests.builders import form_batch, tiny_model, tiny_spec

ALL, SINKS = Objective(readout=ReadoutSpec(over="all")), Objective(readout=ReadoutSpec(over="sinks"))
STAGES: list[tuple[tuple[Group, ...], Objective]] = [
    (("head",), ALL),  # nothing has a gradient
    (("bias", "head"), SINKS),  # queries of the first layer have none
    (("sink", "bias", "lora", "head"), SINKS),
    (("sink", "bias", "lora", "head", "backbone"), ALL),
]
# Events of the sequences: of less than a block, of one and more than one; as many sinks as targets, and none.
SIZES: list[tuple[int, ...]] = [(8, 1, 4), (9,) * 12, (1,)]


class Graphs:
    """A compiler that counts what it is given, and computes it operation by operation."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    found = Graphs()
    torch._dynamo.reset()
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *args: None)  # which refuses gradients on a CPU
    compiled = torch.compile(flex_attention.flex_attention, backend=found, dynamic=True, fullgraph=True)
    monkeypatch.setattr(flex, "flex_attention", compiled)
    return found


@pytest.mark.parametrize("options", [{"temporal": True, "similarity": "vectors", "window": 4}, {}], ids=["all biases", "one"])
def test_all_stages_and_validation_in_both_types_make_two_graphs_each(graphs: Graphs, options: dict[str, Any]) -> None:
    spec = tiny_spec(attention="flex", bias=BiasSpec(layers=0.5), lora=LoraSpec(rank=2), fields={"hidden_size": 64}, **options)
    batches = [form_batch("per_user", 3, events, similarity=options.get("similarity")) for events in SIZES]
    expected = 0
    for precision in ("fp32", "bf16"):
        model = tiny_model(spec, precision=precision)
        for stage, (trainable, objective) in enumerate(STAGES):
            set_trainable(model, trainable)
            for batch in (batches[stage % 3], batches[(stage + 1) % 3]):
                model.train()(batch, objective).loss.backward()
            with torch.no_grad():
                model.eval()(batches[(stage + 2) % 3], objective)
        expected += 2
        assert graphs.count == expected
