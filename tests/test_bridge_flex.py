"""A history read by its chunks with FlexAttention: results and gradients are those of sdpa, and there are two graphs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention

from ctrsink.attention import chunked_flex, flex
from ctrsink.attention.chunked import Chunked
from ctrsink.attention.chunked_dense import Columns
from ctrsink.attention.packed import Packed, Padded
from ctrsink.config.stages import Objective
from ctrsink.families.parameters import set_trainable
from tests.chunked_fixtures import FORMS, a_batch, a_model, run, sparse
from tests.test_bridge import GAPS, LOGS
from tests.test_flex import Largest, chosen
from tests.test_flex_graphs import Graphs, graphs  # noqa: F401

ALL = Objective()
WIDE: dict[str, Any] = {"fields": {"hidden_size": 64}}
close = torch.testing.assert_close
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses gradients on a CPU because its fused kernel has none there; the unfused form has them."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *args: None)


@pytest.mark.parametrize("examples", FORMS)
@pytest.mark.parametrize(
    ("of", "told", "more"),
    [
        ({"summary_bias": True}, {"text_history": 0}, {"kv_heads": 4}),
        ({"chunks": 1, "transition": 1, "window": 1}, {"text_history": 2}, {"temporal": True}),
        (
            {"chunks": 9, "transition": 1, "window": 2, "summary_bias": True},
            {"similarity": "vectors"},
            {"temporal": True, "similarity": "vectors", "kv_heads": 1},
        ),
    ],
)
def test_results_and_gradients_are_those_of_sdpa(
    examples: str, of: dict[str, Any], told: dict[str, Any], more: dict[str, Any]
) -> None:
    batch = a_batch(sparse(**of), examples, LOGS, **told)
    expected, expected_grads = run(a_model(sparse(**of), "sdpa", **more, **WIDE), batch, ALL)
    logits, grads = run(a_model(sparse(**of), "flex", **more, **WIDE), batch, ALL)
    close(logits, expected, atol=1e-5, rtol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        close(grad, expected_grads[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert expected.std() > 0.05


@settings(max_examples=25, deadline=None)
@given(
    st.lists(GAPS, min_size=1, max_size=3),
    st.sampled_from(FORMS),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from([None, 0, 2]),
)
def test_who_sees_what_is_the_rule_by_pair_and_by_block(
    gaps: list[list[int]], examples: str, chunks: int, transition: int, wider: int, text_history: int | None
) -> None:
    of = sparse(chunks=chunks, transition=transition, window=transition + wider)
    batch = a_batch(of, examples, gaps, text_history=text_history)
    packed = Packed.of(batch)
    chunked = Chunked.of(batch, packed)
    made, padded = chunked_flex.inputs(packed, chunked), Padded.of(packed)
    columns = Columns.painted(chunked, padded)
    count, axis = batch.tokens, packed.sequences
    # Of positions, each key in its own column wherever it stands; of means.
    seen = by_pair(made.positions, made.length)
    rows = torch.cat([torch.arange(made.length), chunked.ends.rows])
    assert not seen[:, len(rows) :].any()
    assert not seen[count:, :count].any()
    assert not seen[:count, count : made.length].any()
    found = torch.zeros(made.length, made.length, dtype=torch.int64).index_add_(1, rows, seen[:, : len(rows)].long())
    assert found.max() <= 1  # no position sees one twice
    expected = torch.block_diag(*columns.visible[:, :, : columns.length].float()).bool()
    places = axis.valid(columns.length).flatten().nonzero()[:, 0]
    assert torch.equal(found[:count, :count].bool(), expected[places][:, places])
    of_means = columns.visible[:, :, columns.length :].sum(2)[axis.valid(columns.length)]
    assert torch.equal(by_pair(made.means, made.length).sum(1)[:count], of_means)
    # The pairs that have a bias of their own.
    sinks = found[packed.asked.padded[:, :, None], packed.sinks.padded[:, None, :]].bool()
    assert torch.equal(made.asked.used, sinks & packed.asked.valid[:, :, None] & packed.sinks.valid[:, None, :])


def by_pair(blocks: flex_attention.BlockMask, rows: int) -> torch.Tensor:
    """bool [rows, C], of the pairs that a kernel computes: in blocks seen whole, and by the rule in others that are listed."""
    keys = blocks.seq_lengths[1]
    assert blocks.full_kv_num_blocks is not None
    partial, whole = (
        grid(count, order, rows, keys)
        for count, order in ((blocks.kv_num_blocks, blocks.kv_indices), (blocks.full_kv_num_blocks, blocks.full_kv_indices))
    )
    rule = blocks.mask_mod(None, None, torch.arange(rows)[:, None], torch.arange(keys)[None])  # pyright: ignore[reportArgumentType]
    assert not (partial & whole).any()
    assert (rule | ~whole).all()
    return whole | (partial & rule)


def grid(count: torch.Tensor, order: torch.Tensor | None, rows: int, keys: int) -> torch.Tensor:
    found = chosen(count, order, flex.BLOCK)
    assert found.shape == (rows, keys)
    return found


def test_bf16_is_near() -> None:
    batch = a_batch(sparse(), "per_user", LOGS)
    exact = a_model(sparse(), "sdpa", **WIDE)(batch, ALL).logits.detach()
    found = [a_model(sparse(), attention, "bf16", **WIDE)(batch, ALL).logits.detach() for attention in ("sdpa", "flex")]
    errors = [float((one - exact).abs().mean()) for one in found]
    assert 0 < errors[1] < 1.5 * errors[0]


def test_positions_and_means_share_two_graphs(graphs: Graphs) -> None:  # noqa: F811
    of = sparse(summary_bias=True)
    model = a_model(of, "flex", temporal=True, **WIDE)
    batches = [a_batch(of, "per_user", gaps) for gaps in (LOGS, [[]], [[3, 4, 5]], [[60] * 300])]
    for trainable in (("head",), ("bias", "head"), ("sink", "bias", "head", "backbone")):
        set_trainable(model, trainable)  # pyright: ignore[reportArgumentType]
        for batch in batches:
            model.train()(batch, ALL).loss.backward()
        with torch.no_grad():
            model.eval()(batches[0], ALL)
    assert graphs.count == 2


def test_nothing_outside_the_kernels_is_as_large_as_one_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **rest: Any) -> tuple[torch.Tensor, Any]:
        return query * 1.0, flex_attention.AuxOutput(lse=(query * 1.0).sum(-1))

    monkeypatch.setattr(flex, "flex_attention", no_kernel)
    of = sparse(summary_bias=True)
    model = a_model(of, "flex", layers=1, temporal=True, **WIDE)
    batch = a_batch(of, "per_user", [[60] * 400] * 3)
    with Largest() as seen:
        model(batch, ALL).loss.backward()
    b, length = Padded.of(Packed.of(batch)).kinds.shape
    assert 0 < seen.elements < b * length * length / 2
