"""Rows of sequences one behind another and the same rows padded: each is had from the other, and slots lie at their tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrsink.attention.kinds import PAD, PREFIX, SINK, TEXT
from ctrsink.attention.packed import MULTIPLE, Packed, Padded
from ctrsink.sequences.batch import Axis
from tests.builders import form_batch
from tests.test_flex import EXAMPLES


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 3), st.sampled_from([(), (2,), (2, 3)]))
def test_padding_and_packing_undo_one_another(lengths: list[int], more: int, rest: tuple[int, ...]) -> None:
    axis = Axis.of(np.array(lengths))
    packed = torch.arange(1, 1 + axis.total * int(np.prod(rest))).view(axis.total, *rest)
    width = max(1, axis.longest + more)
    rows = axis.pad(packed, width, -1)
    assert rows.shape == (len(lengths), width, *rest)
    assert torch.equal(axis.pack(rows), packed)
    assert torch.equal(rows.flatten(2).ne(-1).all(-1) if rest else rows.ne(-1), axis.valid(width))
    start = 0
    for row, length in enumerate(lengths):
        assert torch.equal(rows[row, :length], packed[start : start + length])
        assert axis.owner[start : start + length].tolist() == [row] * length
        assert axis.place[start : start + length].tolist() == list(range(length))
        start += length
    assert (axis.total, axis.longest) == (start, max(lengths))
    assert axis.offsets.tolist() == [sum(lengths[:row]) for row in range(len(lengths) + 1)]
    assert not axis.pad(packed, width)[~axis.valid(width)].any()


def test_gradients_go_through_padding_and_packing() -> None:
    axis = Axis.of(np.array([2, 0, 3]))
    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: axis.pad(x, 4), (values,))
    padded = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(axis.pack, (padded,))


@pytest.mark.parametrize("examples", EXAMPLES)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_slots_lie_at_their_tokens_and_unused_ones_in_padding(examples: str, seed: int, events: list[int]) -> None:
    packed = Packed.of(form_batch(examples, seed, tuple(events)))
    of, axis = Padded.of(packed), packed.sequences
    assert of.kinds.shape[1] % MULTIPLE == 0
    assert 0 < of.kinds.shape[1] - axis.longest <= MULTIPLE
    assert (of.kinds[:, -1] == PAD).all()  # in every row, so that unused slots have a place
    assert (packed.kinds != PAD).all()
    for name in ("kinds", "events", "aligned", "candidate"):
        assert torch.equal(axis.pack(getattr(of, name)), getattr(packed, name))
    assert torch.equal((of.kinds != PAD).sum(1), axis.offsets.diff())
    for slots, valid, positions in ((packed.sinks, of.sink_valid, of.sinks), (packed.asked, of.asked_valid, of.asked)):
        assert positions.shape == valid.shape == (len(events), max(1, slots.axis.longest))
        assert torch.equal(valid.sum(1), slots.axis.offsets.diff())
        assert (positions[~valid] == of.kinds.shape[1] - 1).all()
        kinds = of.kinds.gather(1, positions)[valid]
        assert (kinds == (SINK if slots is packed.sinks else TEXT)).all()
        assert torch.equal(packed.kinds[slots.positions], kinds)
        assert (slots.padded[~valid] == 0).all()
        assert torch.equal(slots.padded[valid], slots.positions)
    assert torch.equal(of.sinks[of.sink_valid], torch.cat([row.nonzero()[:, 0] for row in of.kinds == SINK]))


@pytest.mark.parametrize("examples", EXAMPLES)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_what_was_counted_with_the_sequences_is_what_lies_in_them(examples: str, seed: int, events: list[int]) -> None:
    """No one looks for these numbers on the device."""
    batch = form_batch(examples, seed, tuple(events))
    packed = Packed.of(batch)
    of = Padded.of(packed)
    several = torch.tensor([len(row[own].unique()) > 1 for row, own in zip(of.events, of.candidate, strict=True)])
    candidates = of.candidate & several[:, None]
    asked = torch.zeros_like(of.candidate).scatter(1, of.asked, True)
    asked[:, -1] = False
    first = torch.where(of.candidate, of.events, 10**6).amin(1, keepdim=True)
    places = torch.where(of.candidate, first, of.events)
    assert packed.most == {
        "aligned": int(of.aligned.sum(1).max()),
        "candidates": int(candidates.sum(1).max()),
        "asked_rows": int((candidates | asked).sum(1).max()),
        "places": int(places.max()),
        "span": int(batch.inputs["position_ids"].max()) + 1,
    }
    assert (of.events[of.kinds == PREFIX] == 0).all()
