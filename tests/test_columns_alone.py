"""Baselines on the signals' columns: they find what is there, choose on valid, and know nothing of what they predict."""

import numpy as np
import pyarrow as pa
import pytest

from ctrsink.errors import InputError
from ctrsink.evaluate.columns_alone import STRENGTHS, Fitted, lightgbm, logistic, stacked
from ctrsink.evaluate.metrics import auc, logloss

SIZES = {"train": 3000, "valid": 1500, "test": 1500}


def make(sizes: dict[str, int] = SIZES) -> tuple[dict[str, pa.Table], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tables by split; the true logits; what a model that knows `text`, which is no column, would predict."""
    chance = np.random.default_rng(0)
    tables, truth, scores = {}, {}, {}
    for split, rows in sizes.items():
        liked, level, text = chance.normal(size=(3, rows))
        truth[split] = 1.2 * liked + 0.8 * np.abs(level) + text - 0.6
        labels = (chance.random(rows) < 1 / (1 + np.exp(-truth[split]))).astype(np.int8)
        unknown = chance.random(rows) < 0.1
        keys = {
            "user": [f"u{number}" for number in np.arange(rows) // 10],
            "event": np.arange(rows) % 10,
            "item": pa.array(chance.integers(0, 50, rows), pa.int32()),
            "timestamp": np.arange(rows),
            "label": labels,
        }
        signals = {"liked": np.where(unknown, np.nan, liked).astype(np.float32), "level": level.astype(np.float32)}
        tables[split] = pa.table(keys | signals | {"never": np.full(rows, np.nan, np.float32)})
        scores[split] = 1 / (1 + np.exp(-(text + 0.5 * liked)))
    return tables, truth, scores


def auc_on_test(tables: dict[str, pa.Table], fitted: Fitted) -> float:
    return auc(tables["test"]["label"].to_numpy(), fitted.probabilities["test"])


def test_both_find_what_the_columns_say_and_trees_what_is_not_linear() -> None:
    tables, _, _ = make()
    linear, trees = logistic(tables), lightgbm(tables, 0)
    assert 0.66 < auc_on_test(tables, linear) < auc_on_test(tables, trees) < 0.85
    for fitted in (linear, trees):
        assert {split: len(values) for split, values in fitted.probabilities.items()} == {"valid": 1500, "test": 1500}
        assert all(((values > 0) & (values < 1)).all() for values in fitted.probabilities.values())
    assert linear.chosen["strength"] in STRENGTHS
    assert 1 < trees.chosen["rounds"] < 1000


@pytest.mark.parametrize("fit", [logistic, lambda tables: lightgbm(tables, 0)], ids=["logistic", "lightgbm"])
def test_labels_of_test_change_nothing_and_those_of_valid_only_what_is_chosen(fit) -> None:
    tables, _, _ = make()
    before = fit(tables)
    flipped = tables["test"].set_column(4, "label", pa.array(1 - tables["test"]["label"].to_numpy()))
    again = fit(tables | {"test": flipped})
    assert np.array_equal(before.probabilities["test"], again.probabilities["test"])
    assert before.chosen == again.chosen


def test_a_table_without_signal_is_shrunk_as_far_as_it_goes() -> None:
    chance = np.random.default_rng(1)
    tables, _, _ = make()
    noise = {
        split: table.set_column(4, "label", pa.array(chance.integers(0, 2, table.num_rows).astype(np.int8)))
        for split, table in tables.items()
    }
    assert logistic(noise).chosen["strength"] == STRENGTHS[0]
    assert lightgbm(noise, 0).chosen["rounds"] < 30
    assert abs(auc_on_test(noise, lightgbm(noise, 0)) - 0.5) < 0.05


def test_seeds_differ_and_each_gives_the_same_again() -> None:
    tables, _, _ = make()
    one, again, other = (lightgbm(tables, seed).probabilities["test"] for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_stack_knows_more_than_each_of_both() -> None:
    tables, _, scores = make(sizes={"train": 4000, "valid": 4000, "test": 4000})
    labels = tables["test"]["label"].to_numpy()
    found = stacked(tables, scores, 0)
    both = auc(labels, found.probabilities["test"])
    assert both > auc(labels, scores["test"]) + 0.02
    assert both > auc_on_test(tables, lightgbm(tables, 0)) + 0.02
    assert logloss(labels, found.probabilities["test"]) < logloss(labels, scores["test"]) - 0.01


def test_a_stack_of_a_model_that_knows_all_adds_next_to_nothing() -> None:
    tables, truth, _ = make()
    best = {split: 1 / (1 + np.exp(-logits)) for split, logits in truth.items()}
    labels = tables["test"]["label"].to_numpy()
    found = stacked(tables, best, 0)
    assert auc(labels, found.probabilities["test"]) > auc(labels, best["test"]) - 0.01


def test_what_a_stack_predicts_for_a_fold_of_valid_was_fitted_on_the_others() -> None:
    """A score that is the label itself for one user alone: the stack that predicts this user has never seen it work."""
    tables, _, scores = make()
    chance = np.random.default_rng(5)
    labels = chance.integers(0, 2, 1500).astype(np.int8)  # nothing says anything about these
    noise = tables | {"valid": tables["valid"].set_column(4, "label", pa.array(labels))}
    found = stacked(noise, {"valid": chance.random(1500), "test": scores["test"]}, 0)
    assert abs(auc(labels, found.probabilities["valid"]) - 0.5) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tables: {split: table.select(["user", "event", "label"]) for split, table in tables.items()},
            "no column of",
        ),
        (lambda tables: tables | {"test": tables["test"].drop_columns(["level"])}, "the table of test has no column level"),
        (
            lambda tables: tables | {"valid": tables["valid"].set_column(4, "label", pa.array(np.ones(1500, np.int8)))},
            "the impressions of valid have not both labels",
        ),
        (
            lambda tables: tables | {"test": tables["test"].set_column(6, "level", pa.array(np.full(1500, np.inf)))},
            "the column level holds an infinite number",
        ),
    ],
    ids=["no-signal", "lacks-one", "one-label", "infinite"],
)
def test_tables_that_cannot_be_used_are_refused_in_one_line(change, message: str) -> None:
    tables = change(make()[0])
    for fit in (logistic, lambda tables: lightgbm(tables, 0)):
        with pytest.raises(InputError, match=message) as caught:
            fit(tables)
        assert "\n" not in str(caught.value)
