"""Cross-entropy over a sample of a table, and over all of it in blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrsink.families.srp import softmax
from ctrsink.families.srp.masks import negatives
from ctrsink.families.srp.softmax import log_total, sampled_log_total
from tests.srp_fixtures import CLOZE, OF_CLOZE, batch_of, model_of, spec_of, training_groups


@pytest.mark.parametrize("block", [1, 7, 100, 2**16])
def test_blocks_give_the_whole(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "BLOCK", block)
    scores = torch.randn(5, 100, dtype=torch.float64) * 4
    scores[2] = 1.0  # all the same: the first
    total, best = log_total(lambda rows: scores[:, rows], 100, 5, scores.device)
    torch.testing.assert_close(total, scores.logsumexp(1))
    assert best.tolist() == np.asarray(scores).argmax(1).tolist()


@given(st.integers(1, 400), st.data(), st.integers(0, 2**63))
def test_negatives_are_spread_over_the_table(rows: int, data: st.DataObject, key: int) -> None:
    count = data.draw(st.integers(1, rows))
    found = negatives(rows, count, key)
    assert len(found) == count
    assert 0 <= found.min() <= found.max() < rows
    assert (np.diff(found) >= 0).all()
    assert (np.diff(found) <= 2 * rows / count + 1).all()
    if count == rows:
        assert found.tolist() == list(range(rows))


def test_all_rows_are_as_likely_to_be_negatives() -> None:
    counts = np.bincount(np.concatenate([negatives(30, 8, key) for key in range(3000)]), minlength=30) / 3000
    assert np.abs(counts - 8 / 30).max() < 0.04


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_a_sample_of_all_is_exact(seed: int) -> None:
    scores = torch.randn(6, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    truth = torch.arange(6) * 7
    own = scores.gather(1, truth[:, None]).squeeze(1)
    found = sampled_log_total(lambda rows: scores[:, rows], own, truth, torch.arange(50), 50)
    torch.testing.assert_close(found, scores.logsumexp(1))


def test_a_sample_is_right_on_average() -> None:
    """Its exponential, whether or not the true row is among the sample; and a larger sample is nearer."""
    scores = torch.randn(4, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = torch.tensor([0, 3, 77, 199])
    own, exact = scores.gather(1, truth[:, None]).squeeze(1), scores.logsumexp(1)
    errors = []
    for count in (10, 100):
        found = torch.stack(
            [
                sampled_log_total(lambda rows: scores[:, rows], own, truth, torch.from_numpy(negatives(200, count, key)), 200)
                for key in range(2000)
            ]
        )
        torch.testing.assert_close(found.exp().mean(0), exact.exp(), rtol=0.03, atol=0)
        errors.append(float((found - exact).abs().mean()))
    assert errors[1] < errors[0] / 2
    assert errors[1] < 0.1


def test_training_takes_the_sample_and_evaluation_the_whole_table() -> None:
    whole, sampled = spec_of(dropout=0.0, id_dropout=0.0), spec_of(dropout=0.0, id_dropout=0.0, negatives=20)
    batch = batch_of([12, 9], [1, 1], whole)
    models = [model_of(spec) for spec in (whole, sampled)]
    losses = [[float(m.train(on)(m.drawn(batch, CLOZE, 1), CLOZE).loss.detach()) for on in (False, True)] for m in models]
    assert losses[0][0] == losses[1][0]
    assert losses[0][0] == pytest.approx(losses[0][1])
    assert losses[1][0] != losses[1][1]
    assert losses[1][1] == pytest.approx(losses[1][0], rel=0.1)
    told = [set(m.train(on)(m.drawn(batch, CLOZE, 1), CLOZE).tallies) for m in models for on in (False, True)]
    assert told[0] == told[1] == told[2]
    assert told[2] - told[3] == {f"{part}/{name}" for part in ("hits", "of") for name in ("item_id", "hashed.item.brand")}


def test_only_rows_of_the_sample_and_of_the_batch_have_a_gradient() -> None:
    spec = spec_of(rows=4000, negatives=10)
    model = model_of(spec).train()
    batch = model.drawn(batch_of([12, 9], [1, 1], spec), CLOZE, 1)
    training_groups(model, OF_CLOZE)
    model(batch, CLOZE).loss.backward()
    touched = set(model.embedding.table("item_id").weight.grad.abs().sum(1).nonzero().flatten().tolist())  # pyright: ignore
    allowed = {0, *batch.inputs["negatives"].tolist(), *batch.inputs["signals"][:, 0].tolist()}
    assert touched <= allowed
    assert len(touched) > 10
