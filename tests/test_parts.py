"""What is made in parts has the values that it has without, whatever is done to it; test_zero3 does so on two ranks."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ctrsink.dist import Topology
from ctrsink.train.parts import LEAST, InParts

SIZE = (50, 50)
WORK: dict[str, Callable[[list[torch.Tensor], int, int], object]] = {
    "normal": lambda at, i, j: at[i].normal_(),
    "uniform of a part": lambda at, i, j: at[i][3:9].uniform_(),
    "zero of a column": lambda at, i, j: at[i][:, 7].zero_(),
    "add": lambda at, i, j: at.__setitem__(i, at[i] + at[j]),
    "product": lambda at, i, j: at.__setitem__(i, at[i] @ at[j] / 50),
    "another name": lambda at, i, j: at.__setitem__(i, at[j].view(SIZE)),
    "transposed": lambda at, i, j: at.__setitem__(i, at[j].T),
    "copy": lambda at, i, j: at.__setitem__(i, at[j].clone()),
    "in between": lambda at, i, j: at[i].mul_(at[j].double().square().mean().float()),
}
"""Things done to the first of two tensors among several."""


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of this process, unless there is one."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def done(work: list[tuple[str, int, int]], before: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    tensors = [torch.empty(SIZE).normal_(), torch.ones(SIZE), before]
    for name, i, j in work:
        WORK[name](tensors, i, j)
    return tensors


@given(st.lists(st.tuples(st.sampled_from(sorted(WORK)), st.integers(0, 2), st.integers(0, 2)), max_size=12))
def test_values_are_the_same(work: list[tuple[str, int, int]]) -> None:
    before, other = torch.full(SIZE, 0.5), torch.full(SIZE, 0.5)
    expected = done(work, before)
    parts = InParts(Topology())
    with parts:
        found = done(work, other)
    for tensor in found:
        parts.fill(tensor)
    for one, other_one in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other_one, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(other, before)


def test_only_what_is_worked_on_is_whole() -> None:
    parts = InParts(Topology())
    outside = torch.ones(SIZE)
    with parts:
        made = [torch.empty(SIZE).normal_() for _ in range(9)]
        made.append(outside * 2)
        small = torch.ones(LEAST // 4 - 1)
    whole = [tensor.untyped_storage().nbytes() > 0 for tensor in made]
    assert whole == [False] * 10
    assert small.sum() == LEAST // 4 - 1
    assert outside.sum() == 2500
    parts.fill(made[-1])
    assert made[-1].sum() == 5000
