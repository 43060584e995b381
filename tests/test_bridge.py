"""Attention to a history by its chunks (`model.sparse`): equal to its definition, and no score knows what comes later."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.attention import chunked_blocks
from ctrsink.attention.chunked import Chunked
from ctrsink.attention.chunked_dense import Columns
from ctrsink.attention.chunked_products import ChunkedProducts
from ctrsink.attention.packed import Packed, Padded
from ctrsink.config.stages import Objective, ReadoutSpec
from ctrsink.dataset.events import UserEvents
from ctrsink.families.decoder.model import CTRModel
from tests.builders import batch_of, tiny_model, tiny_spec, told_sequence
from tests.chunked_fixtures import (
    FORMS,
    a_batch,
    a_chronology,
    a_model,
    as_defined,
    layout,
    plain_keys,
    run,
    sparse,
)
from tests.test_flex import Largest

ALL, SINKS = Objective(), Objective(readout=ReadoutSpec(over="sinks"))
GAPS = st.lists(st.sampled_from([0, 0, 1, 60, 3600, 86400, 500_000]), max_size=40)
LOGS = [[7, 86400, 5, 60, 60, 0, 3, 900, 1, 1, 50, 4000] * 3, [], [1, 1, 1], list(range(24))]
close = torch.testing.assert_close


@pytest.fixture(params=[3, chunked_blocks.QUERIES], ids=["small blocks", "blocks"])
def queries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(chunked_blocks, "QUERIES", request.param)
    return request.param


@pytest.mark.parametrize("examples", FORMS)
@pytest.mark.parametrize(
    ("of", "told", "more"),
    [
        ({}, {}, {}),
        ({"summary_bias": True}, {"text_history": 0}, {"kv_heads": 4}),
        ({"chunks": 1, "transition": 1, "window": 1}, {"text_history": 2}, {"temporal": True}),
        ({"chunks": 7, "transition": 3, "window": 50}, {"similarity": "vectors"}, {"similarity": "vectors", "kind": "qwen3"}),
        (
            {"chunks": 9, "transition": 1, "window": 2, "summary_bias": True},
            {"similarity": "vectors"},
            {"temporal": True, "similarity": "vectors", "kv_heads": 1},
        ),
    ],
)
def test_results_and_gradients_are_those_of_the_definition(
    queries: int, examples: str, of: dict[str, Any], told: dict[str, Any], more: dict[str, Any]
) -> None:
    batch = a_batch(sparse(**of), examples, LOGS, **told)
    model = a_model(sparse(**of), "sdpa", **more)
    expected, expected_grads = run(as_defined(model, batch), batch, ALL)
    for found in (model, a_model(sparse(**of), "blocks", **more)):
        logits, grads = run(found, batch, ALL)
        close(logits, expected, atol=1e-5, rtol=1e-5)
        assert grads.keys() == expected_grads.keys() == dict(model.named_parameters()).keys()
        for name, grad in grads.items():
            close(grad, expected_grads[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert expected.std() > 0.05


@settings(max_examples=25)
@given(
    st.lists(GAPS, min_size=1, max_size=3),
    st.sampled_from(FORMS),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from([None, 0, 2]),
    st.integers(1, 40),
)
def test_any_batch_and_any_size_of_block_equal_sdpa(
    gaps: list[list[int]], examples: str, chunks: int, transition: int, wider: int, text_history: int | None, size: int
) -> None:
    of = sparse(chunks=chunks, transition=transition, window=transition + wider, summary_bias=True)
    batch = a_batch(of, examples, gaps, text_history=text_history)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(chunked_blocks, "QUERIES", size)
        patch.setattr(chunked_blocks, "AT_ONCE", 2 * size)
        blocks, sdpa = (a_model(of, attention, temporal=True)(batch, ALL).logits for attention in ("blocks", "sdpa"))
    close(blocks, sdpa, atol=1e-5, rtol=1e-5)


def test_gradients_are_exact_in_double_precision() -> None:
    batch = a_batch(sparse(), "per_user", [LOGS[0][:5], [1]])
    packed = Packed.of(batch)
    chunked = Chunked.of(batch, packed)
    made = chunked_blocks.inputs(packed, chunked, sparse())
    torch.manual_seed(0)
    length, keys = batch.tokens, batch.tokens + len(chunked.starts)
    shapes = [(length, 4, 2), (keys, 2, 2), (keys, 2, 2), (2, 4, packed.asked.width, packed.sinks.width), (4,)]
    values = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *x: ChunkedProducts.apply(*x, 0.5, made.blocks), values)


def test_bf16_is_near() -> None:
    batch = a_batch(sparse(), "per_user", LOGS)
    exact = a_model(sparse(), "sdpa")(batch, ALL).logits.detach()
    found = [a_model(sparse(), attention, "bf16")(batch, ALL).logits.detach() for attention in ("sdpa", "blocks")]
    errors = [float((one - exact).abs().mean()) for one in found]
    assert 0 < errors[1] < 1.5 * errors[0]


def logits(model: CTRModel, chronology: UserEvents, targets: np.ndarray, examples: str, **more: Any) -> torch.Tensor:
    assert model.sparse is not None
    with torch.no_grad():
        found = model(batch_of([told_sequence(chronology, targets, layout(model.sparse, examples, **more))]), ALL).logits
    assert found is not None
    return found


def changed_after(chronology: UserEvents, event: int, gaps: Sequence[int]) -> tuple[UserEvents, UserEvents]:
    """Two chronologies that are equal before the event; from it on other items, labels and gaps, texts of the same lengths."""
    c, later = chronology, np.arange(len(chronology.texts)) >= event
    c = dataclasses.replace(c, texts=np.where(c.texts % 2, 1, 4), feedbacks=np.ones_like(c.feedbacks))
    after = np.where(later, np.resize(gaps, len(later)), np.diff(c.timestamps, prepend=c.timestamps[0]))
    labels = np.where(later, 1 - c.labels, c.labels).astype(np.int8)
    times = c.timestamps[0] + after.cumsum()
    return c, dataclasses.replace(c, texts=np.where(later, 5 - c.texts, c.texts), labels=labels, timestamps=times)


@settings(max_examples=40)
@given(GAPS.filter(lambda gaps: len(gaps) >= 3), st.data(), st.integers(1, 5), st.sampled_from([None, 0]))
def test_no_per_user_score_knows_a_later_event(
    gaps: list[int], data: st.DataObject, chunks: int, text_history: int | None
) -> None:
    event = data.draw(st.integers(1, len(gaps)))
    later = data.draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
    of = sparse(chunks=chunks, summary_bias=True)
    chronology, targets = a_chronology(gaps, "per_user", data.draw(st.integers(len(gaps) - event + 2, len(gaps) + 1)))
    one, other = changed_after(chronology, event, later)
    earlier = int((targets < event).sum())
    for attention in ("blocks", "sdpa"):
        model = a_model(of, attention, temporal=True)
        before, after = (logits(model, c, targets, "per_user", text_history=text_history) for c in (one, other))
        if attention == "blocks":
            assert torch.equal(before[:earlier], after[:earlier])
        # How many means there are at all depends on later gaps, and with it how torch sums a row.
        close(before[:earlier], after[:earlier], atol=2e-6, rtol=0)
        assert (before[earlier:] != after[earlier:]).any()


@pytest.mark.parametrize("examples", ["per_target", "per_request"])
@pytest.mark.parametrize("attention", ["blocks", "sdpa"])
def test_no_score_of_a_request_knows_answers_or_what_comes_later(examples: str, attention: str) -> None:
    gaps = [*LOGS[0], 0, 0, 10, 20]
    asked = [36] if examples == "per_target" else [36, 37, 38]
    model = a_model(sparse(), attention, temporal=True)
    chronology, _ = a_chronology(gaps, "per_user", 1)
    known = np.minimum(np.arange(len(gaps) + 1), 36)
    chronology = dataclasses.replace(chronology, known=np.where(np.arange(len(known)) > 38, np.arange(len(known)), known))
    found = logits(model, chronology, np.array(asked), examples)
    _, later = changed_after(chronology, asked[-1] + 1, [5])
    later = dataclasses.replace(
        later, texts=np.append(chronology.texts[:39], 5 - later.texts[39:]), feedbacks=chronology.feedbacks
    )
    assert torch.equal(found, logits(model, later, np.array(asked), examples))
    answered = dataclasses.replace(
        chronology,
        labels=np.where(known >= 36, 1 - chronology.labels, chronology.labels).astype(np.int8),
        feedbacks=np.where(np.arange(len(known)) >= 36, 0, chronology.feedbacks),
    )
    assert torch.equal(found, logits(model, answered, np.array(asked), examples))
    assert (found != logits(model, changed_after(chronology, 30, [5])[1], np.array(asked), examples)).all()


@pytest.mark.parametrize("attention", ["blocks", "sdpa"])
def test_a_candidate_does_not_depend_on_the_others(attention: str) -> None:
    model = a_model(sparse(), attention)
    chronology, targets = a_chronology([*LOGS[0], 0, 0, 0], "per_request", 4)
    together = logits(model, chronology, targets, "per_request")
    alone = torch.cat([logits(model, chronology, targets[i : i + 1], "per_target") for i in range(4)])
    close(together, alone, atol=1e-6, rtol=0)
    assert len(set(together.tolist())) > 1


@pytest.mark.parametrize("attention", ["blocks", "sdpa"])
def test_a_sequence_does_not_depend_on_those_beside_it(attention: str) -> None:
    of = sparse(summary_bias=True)
    model = a_model(of, attention)
    told = [told_sequence(*a_chronology(gaps, "per_user", 3, seed), layout(of, "per_user")) for seed, gaps in enumerate(LOGS)]
    with torch.no_grad():
        together = model(batch_of(told), ALL).logits
        alone = torch.cat([model(batch_of([one]), ALL).logits for one in told])
    close(together, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["blocks", "sdpa"])
def test_nothing_seen_is_no_trouble(attention: str, precision: str) -> None:
    model = a_model(sparse(summary_bias=True), attention, precision, temporal=True).train()
    for examples in FORMS:
        for gaps in ([[], []], [[], [3] * 30]):
            found, grads = run(model, a_batch(sparse(), examples, gaps, targets=1, text_history=0), ALL)
            assert torch.isfinite(found).all()
            assert grads.keys() == dict(model.named_parameters()).keys()
            assert all(torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("examples", ["per_target", "per_request"])
def test_within_the_window_every_sink_is_seen_and_the_means_beside_them(examples: str) -> None:
    """So a short history is not read as by plain attention, unless the means are given no weight."""
    of = sparse(window=40, summary_bias=True)
    batch = a_batch(of, examples, LOGS, text_history=0)
    bare = a_batch(of, examples, LOGS, text_history=0, chunks=0)
    means = sum(len(chunks) for _, chunks in plain_keys(of, batch))
    assert batch.costs["pairs"] == bare.costs["pairs"] + means > bare.costs["pairs"]
    plain, model = tiny_model(tiny_spec().model_copy(update={"bias": None})), a_model(of)
    expected = run(plain, bare, ALL)[0]
    assert (run(model, batch, ALL)[0] - expected).abs().max() > 1e-3
    for bias in model.summaries:
        bias.get_parameter("weight").data.fill_(-1e4)
    close(run(model, batch, ALL)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["blocks", "sdpa"])
def test_every_readout_has_one_sight(attention: str) -> None:
    batch, model = a_batch(sparse(), "per_user", LOGS), a_model(sparse(), attention)
    assert torch.equal(run(model, batch, ALL)[0], run(model, batch, SINKS)[0])
    pooled = Objective(readout=ReadoutSpec(over="sinks", form="pool"))
    assert not torch.equal(run(model, batch, ALL)[0], run(model, batch, pooled)[0])


@settings(max_examples=30)
@given(st.lists(GAPS, min_size=1, max_size=3), st.sampled_from(FORMS), st.integers(1, 5), st.integers(1, 3), st.integers(0, 9))
def test_pairs_are_counted_as_they_are_seen(
    gaps: list[list[int]], examples: str, chunks: int, transition: int, wider: int
) -> None:
    of = sparse(chunks=chunks, transition=transition, window=transition + wider)
    batch = a_batch(of, examples, gaps, text_history=2)
    keys = plain_keys(of, batch)
    assert batch.costs == {"pairs": sum(len(seen) + len(chunks) for seen, chunks in keys)}
    packed = Packed.of(batch)
    seen = Columns.painted(Chunked.of(batch, packed), Padded.of(packed)).visible
    assert seen.sum() - (seen.shape[0] * seen.shape[1] - batch.tokens) == batch.costs["pairs"]


def test_a_step_costs_by_the_keys_that_are_seen() -> None:
    model, batch = a_model(sparse()), a_batch(sparse(), "per_user", LOGS)
    for objective in (ALL, SINKS):
        found = model.flop_count(objective)(batch)
        assert found.attention == 12 * 32 * 2 * batch.costs["pairs"]
        assert found.matrices == 6 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) * batch.tokens


@pytest.mark.parametrize("growing", [False, True])
def test_work_and_memory_are_linear_in_the_history(growing: bool) -> None:
    """Also where every gap is the longest so far: each behaviour then ends a chunk and makes one of two."""
    of, elements, pairs, largest = sparse(chunks=4, window=8, summary_bias=True), [], [], []
    model = a_model(of, temporal=True)
    for count in (500, 2000):
        gaps = range(count) if growing else np.random.default_rng(0).integers(0, 10**6, count)
        batch = a_batch(of, "per_target", [list(gaps)], text_history=0)
        packed = Packed.of(batch)
        made = chunked_blocks.inputs(packed, Chunked.of(batch, packed), of)
        elements.append(sum(part.hidden.numel() for part in made.blocks))
        pairs.append(batch.costs["pairs"])
        with Largest() as seen:
            run(model, batch, ALL)
        largest.append(seen.elements)
    assert elements[1] < 4.2 * elements[0]
    assert pairs[1] < 4.2 * pairs[0]
    assert largest[1] < 4.2 * largest[0]
    assert largest[1] < 2000 * 2000 / 8


@given(GAPS, st.integers(1, 6), st.booleans(), st.sampled_from([None, 0]))
def test_blocks_hold_all_rows_once(gaps: list[int], chunks: int, growing: bool, text_history: int | None) -> None:
    of = sparse(chunks=chunks)
    gaps = np.sort(gaps).tolist() if growing else gaps
    batch = a_batch(of, "per_user", [gaps, [5]], text_history=text_history)
    packed = Packed.of(batch)
    made = chunked_blocks.inputs(packed, Chunked.of(batch, packed), of)
    rows = torch.cat([part.rows.flatten() for part in made.blocks])
    assert torch.equal(rows[rows < batch.tokens].sort().values, torch.arange(batch.tokens))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    batch, of = a_batch(sparse(), "per_user", LOGS), sparse(summary_bias=True)
    expected, expected_grads = run(a_model(of, temporal=True).train(), batch, ALL)
    found, grads = run(a_model(of, temporal=True, gradient_checkpointing=True).train(), batch, ALL)
    close(found, expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        close(grad, expected_grads[name])


@pytest.mark.parametrize("attention", ["blocks", "sdpa"])
def test_what_a_mean_is_paid_its_sinks_are_paid_in_equal_parts(attention: str) -> None:
    of = sparse(summary_bias=True)
    batch = a_batch(of, "per_target", [LOGS[0]])
    model = a_model(of, attention, temporal=True)
    found = model.paid(batch, ALL)
    plain = as_defined(model, batch)
    run(plain, batch, ALL)
    at = batch.inputs["sink_positions"].tolist()
    expected = dict.fromkeys(at, 0.0)
    for layer in plain.backbone.layers:  # pyright: ignore[reportGeneralTypeIssues]
        seen, chunks, weights = layer.self_attn.paid[int(batch.inputs["asked_positions"][0])]
        for position, weight in zip(seen, weights, strict=False):
            if position in expected:
                expected[position] += weight
        for chunk, weight in zip(chunks, weights[len(seen) :], strict=True):
            for position in chunk:
                expected[position] += weight / len(chunk)
    assert found is not None
    close(found, torch.tensor([expected[position] for position in at]), atol=1e-5, rtol=1e-4)
    assert model.look(batch, ALL, model) == pytest.approx({"sink_attention/layer00": 1, "sink_attention/layer01": 1})


def test_a_bias_of_means_starts_at_nothing_and_is_trained_as_a_bias() -> None:
    model = tiny_model(tiny_spec().model_copy(update={"bias": None, "sparse": sparse(summary_bias=True)}))
    found = dict(model.summaries.named_parameters(prefix="summaries"))
    assert len(found) == 2
    assert {model.group_of(name) for name in found} == {"bias"}
    assert not any(parameter.any() for parameter in found.values())
