"""Micro-batches on their way to a card, driven by fakes of its streams: what is told to whom, and in which order."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.sequences.batch import Batch
from ctrsink.train import feed
from tests.builders import form_batch

CARD = "cuda:0"


class Streams:
    """The side stream and the one that computes; what happens, in its order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.inside = "computing"

    def wait_stream(self, other: object) -> None:
        self.told.append("computing waits for the copies so far")

    @contextmanager
    def entered(self, stream: object) -> Iterator[None]:
        self.inside = "copying"
        yield
        self.inside = "computing"


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Tensors stay in this memory, and copies to the card are noted."""
    found, to = Streams(), torch.Tensor.to

    def noted(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if args == (CARD,):
            assert kwargs == {"non_blocking": True}
            assert tensor.dtype == torch.uint8
            found.told.append(f"{found.inside}: a copy of {tensor.numel()} bytes")
            return tensor.clone()
        return to(tensor, *args, **kwargs)  # pyright: ignore[reportArgumentType, reportCallIssue]

    monkeypatch.setattr(torch.Tensor, "to", noted)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: found.told.append("its memory is computing's"))
    monkeypatch.setattr(torch.cuda, "stream", found.entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found)
    monkeypatch.setattr(feed, "_copying", lambda device: found)
    monkeypatch.setattr(feed, "_pinned", lambda size: torch.full((size,), 255, dtype=torch.uint8))
    return found


def tensors(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.mapped(lambda tensor: (found.append(tensor), tensor)[1])
    return found


def test_each_batch_is_one_copy_made_while_the_one_before_is_computed(streams: Streams) -> None:
    batches = [form_batch("per_user", seed, (seed, 3)) for seed in (1, 2, 6)]
    for number, batch in enumerate(feed.fed(batches, CARD)):
        streams.told.append("computing")
        assert all(torch.equal(a, b) for a, b in zip(tensors(batch), tensors(batches[number]), strict=True))
    copies = [f"copying: a copy of {sum(t.nbytes + -t.nbytes % 16 for t in tensors(batch))} bytes" for batch in batches]
    taken = ["computing waits for the copies so far", "its memory is computing's"]
    assert streams.told == [
        copies[0], *taken, copies[1], "computing", *taken, copies[2], "computing", *taken, "computing",
    ]  # fmt: skip


def test_what_is_evaluated_is_one_copy_too(streams: Streams) -> None:
    batch = form_batch("per_request", 4, (8, 1, 5))
    there = feed.placed(batch, CARD)
    assert len(streams.told) == 1
    assert streams.told[0].startswith("computing: a copy of ")
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors(there) if tensor.numel()}) == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 7), min_size=1, max_size=3), st.sampled_from(["per_user", "per_request"]))
def test_nothing_changes_on_the_way(seed: int, events: list[int], examples: str) -> None:
    """Every type, and inputs without a row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "_pinned", lambda size: torch.full((size,), 255, dtype=torch.uint8))
        patch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: tensor.clone())
        batch = form_batch(examples, seed, tuple(events))
        there = feed.placed(batch, CARD)
    for name, tensor in batch.inputs.items():
        assert torch.equal(there.inputs[name], tensor)
        assert (there.inputs[name].dtype, there.inputs[name].is_contiguous()) == (tensor.dtype, True)
        assert there.inputs[name].data_ptr() % tensor.element_size() == 0
    for name, axis in batch.axes.items():
        assert torch.equal(there.axes[name].offsets, axis.offsets)
        assert there.axes[name].lengths is axis.lengths
    assert torch.equal(there.targets.labels, batch.targets.labels)
    assert (there.tokens, there.costs) == (batch.tokens, batch.costs)
