"""How often a step of the engine makes the host wait for what the device computes: once, beside what DeepSpeed asks."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import ctrsink
from ctrsink.config import parse_run
from ctrsink.config.stages import StageSpec
from ctrsink.dist import Topology
from ctrsink.families.decoder.build import build_model
from ctrsink.train.engine import Engine
from tests.builders import VOCABULARY, form_batch
from tests.runs import run_tree

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "repeat_interleave")
READS = ("tolist", "numpy", "cpu")  # on a CPU these are no operations
OURS, DEEPSPEED, OPTIMIZER = str(Path(ctrsink.__file__).parent), "/deepspeed/", "/torch/optim/"


class Waits(TorchDispatchMode):
    """Counts what the host reads of the device, by who asked: the nearest caller that is ours, DeepSpeed or Adam.

    Adam's are no waits: its step counts are on the host, whatever the device is. Nor are those by which DeepSpeed looks whether a
    norm is a number, where Engine has given it the norm on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by: Counter[str] = Counter()
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        for name in READS:
            self.patch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_truth = name.startswith("index") and any(of is not None and of.dtype == torch.bool for of in _indices(args))
        if by_truth or (name in WAITS and (kwargs or {}).get("output_size") is None):
            self._count()
        return func(*args, **(kwargs or {}))

    def _counted(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._count()
            return read(*args, **kwargs)

        return wrapper

    def _count(self) -> None:
        frame: Any = sys._getframe(2)
        while frame is not None and not _owner(frame.f_code.co_filename):
            frame = frame.f_back
        owner = "nobody" if frame is None else _owner(frame.f_code.co_filename)
        self.by["the norm" if frame is not None and frame.f_code.co_name == "is_invalid_grad_norm" else owner] += 1


def _indices(args: Any) -> list[torch.Tensor | None]:
    return list(args[1]) if len(args) > 1 and isinstance(args[1], list | tuple) else []


def _owner(file: str) -> str:
    return next((name for name in (OURS, DEEPSPEED, OPTIMIZER) if name in file), "")


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def engine_of(zero_stage: int, **changes: Any) -> tuple[Engine, StageSpec]:
    spec = parse_run(run_tree("data", "run", train={"zero_stage": zero_stage}, **changes), "test")
    stage = spec.stages[1]
    return Engine(build_model(spec.model, VOCABULARY, 1).train(), spec, stage, Topology(), None), stage  # pyright: ignore[reportArgumentType]


# Under ZeRO 3 DeepSpeed asks of its own whether the norm is a number.
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("zero_stage", "deepspeed"), [(0, 0), (1, 0), (2, 0), (3, 1)])
def test_the_host_waits_once_in_a_step(zero_stage: int, deepspeed: int) -> None:
    engine, stage = engine_of(zero_stage)
    batches = [form_batch("per_user", seed, (8, 1, 5)) for seed in range(3)]
    impressions = sum(batch.impressions for batch in batches)
    engine.step(batches, impressions, stage, 1.0, (1.0, 0.0))  # the first one makes what is kept
    with Waits() as waits:
        result = engine.step(batches, impressions, stage, 1.0, (1.0, 0.0))
    assert result.votes == (1.0, 0.0)
    assert 0 < result.grad_norm < float("inf")
    assert waits.by["nobody"] == 0
    assert waits.by[OURS] == 1
    assert waits.by[DEEPSPEED] + (waits.by["the norm"] if zero_stage == 3 else 0) == deepspeed


def test_what_is_counted() -> None:
    x = torch.arange(3.0)
    with Waits() as waits:
        x.sum().item()
        x.nonzero()
        bool(x.sum() > 0)
        x[x > 0]
        x[:2].repeat_interleave(x[1:].long())
        x.tolist()
    assert waits.by.total() == 6
