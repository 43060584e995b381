"""Predictions come together on the first rank, whole users in order, and of very many a stated bound holds for the AUC."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrsink.config.train import EvaluateSpec
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.manifest import read_file
from ctrsink.dataset.reader import Dataset
from ctrsink.dist import Topology
from ctrsink.evaluate import evaluator, prediction_file, predictions
from ctrsink.evaluate.binned import BINS, BinnedMetrics, bins_of
from ctrsink.evaluate.evaluator import evaluate_splits, predict, validation_sample
from ctrsink.evaluate.predictions import Predictions
from ctrsink.families.protocol import Out
from ctrsink.families.registry import source_of
from ctrsink.features.mix64 import mix64
from ctrsink.sequences.batch import Batch
from ctrsink.stream.evaluation import drawn, share_of
from ctrsink.stream.order import Order
from tests.builders import make_dataset

LAYOUT = Layout("decoder", "per_target", 3, 1)


def forward(batch: Batch) -> Out:
    """A hash of user and event in few values: ties are the rule."""
    of = batch.targets
    scores = mix64(of.users.numpy() * 1000 + of.events.numpy(), 5) % np.uint64(7)
    return Out(torch.zeros(()), torch.from_numpy(scores.astype(np.float32)) - 3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(make_dataset(tmp_path_factory.mktemp("predictions")), keep_shards=3)


@pytest.mark.parametrize("rounds", [1, 3, 1000])
def test_parts_are_in_order_and_no_user_is_in_two(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, rounds: int) -> None:
    source = source_of(dataset, "train", LAYOUT)
    monkeypatch.setattr(predictions, "GATHERED", rounds)
    share = share_of(source, drawn(source, None), 2, 0, 1)
    parts = list(predictions.predicted(forward, share, "train", Topology()))
    assert (len(parts) > 2) == (rounds < 1000)
    for a, b in itertools.pairwise(parts):
        assert a.users.max() < b.users.min()
    whole = Predictions.together(parts)
    assert np.array_equal(np.lexsort((whole.events, whole.users)), np.arange(len(whole.users)))
    assert len(whole.users) == int(source.impressions(drawn(source, None)).sum())


def test_a_round_says_who_is_still_to_come_whatever_the_number_of_ranks(dataset: Dataset) -> None:
    source = source_of(dataset, "train", LAYOUT)
    shares = [share_of(source, drawn(source, None), 2, rank, 3) for rank in range(3)]
    seen = [[batch.targets.users[batch.targets.counted].numpy() for batch in share.batches] for share in shares]
    (finished,) = {tuple(share.finished.tolist()) for share in shares}
    for number, first in enumerate(finished):
        later = np.concatenate([np.empty(0, np.int64), *(users for rank in seen for users in rank[number + 1 :])])
        assert later.min(initial=np.iinfo(np.int64).max) >= first
    assert finished[-1] == np.iinfo(np.int64).max


@pytest.mark.parametrize("count", [1, 20, 41, 10**6])
def test_the_sample_of_all_shards_is_the_one_that_it_always_was(dataset: Dataset, count: int) -> None:
    """The first of a permutation of the whole split, without making one."""
    source = source_of(dataset, "train", LAYOUT)
    order = Order(source.per_shard, 0, len(source.per_shard))
    expected = np.sort(order.ids(0, sum(source.per_shard))[:count])
    assert np.array_equal(drawn(source, count), expected)
    assert np.array_equal(drawn(source, count, len(source.per_shard)), expected)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_sample_of_few_shards_opens_these_alone_and_more_where_they_hold_too_little(dataset: Dataset, shards: int) -> None:
    source = source_of(dataset, "train", LAYOUT)
    ends = np.cumsum(source.per_shard)
    few = drawn(source, 5, shards)
    opened = set(np.searchsorted(ends, few, side="right").tolist())
    assert len(few) == len(set(few.tolist())) == 5
    assert 1 <= len(opened) <= shards
    assert set(drawn(source, 3, shards).tolist()) < set(few.tolist())
    assert len(drawn(source, int(ends[-1]) - 1, shards)) == ends[-1] - 1


def test_a_validation_reads_once_and_leaves_the_shards_of_the_training_open(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def read(uri: str, entry: Any) -> bytes:
        opened.append(entry.path)
        return read_file(uri, entry)

    monkeypatch.setattr("ctrsink.dataset.reader.read_file", read)
    training = Dataset(dataset.uri, keep_shards=2)
    source = source_of(training, "train", LAYOUT)
    source.build(drawn(source, 3, 1))
    held = list(training._shards)
    sample = validation_sample(training, "valid", LAYOUT, 30, 4, Topology())
    first = evaluator.measure(forward, sample, "valid", Topology())
    opened.clear()
    assert evaluator.measure(forward, sample, "valid", Topology()) == first
    assert opened == []
    assert list(training._shards) == held
    spec = EvaluateSpec(batch_size=4, max_sequences=30)
    assert predict(forward, Dataset(dataset.uri), "valid", LAYOUT, spec).metrics() == first


def test_what_is_written_and_measured_does_not_depend_on_the_parts(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(name: str) -> tuple[dict[str, float], Any]:
        spec = EvaluateSpec(splits=("test",), batch_size=2)
        found = evaluate_splits(forward, dataset, LAYOUT, spec, str(tmp_path / name), 7, Topology())["test"]
        told = json.loads((tmp_path / name / "evaluation/test.json").read_text())
        assert {key: told[key] for key in found if not math.isnan(found[key])} == {
            key: value for key, value in found.items() if not math.isnan(value)
        }
        assert told["step"] == 7
        return found, pq.read_table(tmp_path / name / "evaluation/test.parquet")

    whole, table = evaluated("whole")
    assert whole == predict(forward, dataset, "test", LAYOUT, EvaluateSpec(batch_size=2)).metrics()
    monkeypatch.setattr(predictions, "GATHERED", 2)
    monkeypatch.setattr(prediction_file, "ROWS", 5)
    parts, again = evaluated("parts")
    assert (parts, again) == (whole, table)
    assert pq.ParquetFile(tmp_path / "parts/evaluation/test.parquet").num_row_groups > 1
    monkeypatch.setattr(evaluator, "EXACT", 3)
    sums, again = evaluated("sums")
    assert again == table
    assert abs(sums.pop("auc") - whole["auc"]) <= sums.pop("auc_error") + 1e-12
    assert sums == {name: pytest.approx(whole[name], abs=1e-9, nan_ok=True) for name in sums}
    assert sums.keys() == whole.keys() - {"auc"}


rows = st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1), st.integers(0, 5)), min_size=1, max_size=60)


@given(rows, st.sampled_from([0.0, 3e-5, 0.01]))
def test_the_error_of_the_binned_auc_is_bounded_as_it_says(table: list[tuple[int, float, int]], close: float) -> None:
    """`close`: predictions within so much of one another, so that many share a bin."""
    table = sorted(table, key=lambda row: row[2])
    labels, scores, users = (np.array(column) for column in zip(*table, strict=True))
    scores = 0.3 + close * scores if close else scores
    whole = Predictions(users, np.arange(len(users)), labels.astype(np.int8), scores)
    sums = BinnedMetrics()
    for user in np.unique(users):
        own = users == user
        sums.add(Predictions(users[own], whole.events[own], whole.labels[own], scores[own]))
    found, exact = sums.metrics(), whole.metrics()
    if not math.isnan(exact["auc"]):
        assert abs(found["auc"] - exact["auc"]) <= found["auc_error"] + 1e-12
    for name in ("impressions", "gauc", "uauc", "users", "uauc_two", "users_two", "logloss", "normalised_entropy"):
        assert found[name] == pytest.approx(exact[name], rel=1e-9, abs=1e-9, nan_ok=True), name


@given(st.lists(st.floats(0, 1), min_size=2, max_size=50))
def test_bins_rise_with_predictions_and_are_as_fine_near_one_as_near_zero(values: list[float]) -> None:
    ascending = np.sort(np.array(values))
    bins = bins_of(ascending)
    assert (np.diff(bins) >= 0).all()
    assert bins.min() >= 0
    assert bins.max() < BINS
    assert np.array_equal(bins_of(1 - ascending[ascending > 0.5]), BINS - 1 - bins[ascending > 0.5])


def test_of_a_click_models_predictions_the_error_is_small() -> None:
    chance = np.random.default_rng(0)
    scores = chance.beta(2, 20, 300_000)
    labels = (chance.random(len(scores)) < scores).astype(np.int8)
    whole = Predictions(np.sort(chance.integers(0, 50_000, len(scores))), np.arange(len(scores)), labels, scores)
    sums = BinnedMetrics()
    sums.add(whole)
    found, exact = sums.metrics(), whole.metrics()
    assert abs(found["auc"] - exact["auc"]) <= found["auc_error"] < 5e-5
    assert found["calibration_error"] == pytest.approx(exact["calibration_error"], abs=1e-4)
