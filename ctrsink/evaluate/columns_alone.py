"""What the signals are worth without a language model: logistic regression and LightGBM on their columns.

A table has `user`, `event`, `item`, `timestamp` and `label`, and behind them a column of numbers for each signal, NaN where
unknown. Models are fitted on the train split; valid chooses how strongly they are fitted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ctrsink.errors import InputError, first_line
from ctrsink.evaluate.metrics import log_losses, logloss

KEYS = ("user", "event", "item", "timestamp", "label")
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Values of C that logistic regression is tried with."""
ROUNDS, PATIENCE = 2000, 50
"""Trees at most; as many without a gain on valid end the fit."""
FOLDS, CORRECTIONS = 5, 200
"""Of a stack: parts of valid, and trees at most."""
_TREES = {"objective": "binary", "learning_rate": 0.05, "num_leaves": 31, "min_data_in_leaf": 50, "feature_fraction": 0.8}
_TREES |= {"bagging_fraction": 0.8, "bagging_freq": 1, "lambda_l2": 1.0, "deterministic": True, "num_threads": 1, "verbosity": -1}
# A stack has a tenth of the data, and little to add to the scores that it starts from.
_CORRECTION = _TREES | {"learning_rate": 0.03, "num_leaves": 15, "min_data_in_leaf": 100}


@dataclass(frozen=True)
class Fitted:
    """What a model makes of the tables that it was given."""

    probabilities: dict[str, np.ndarray]
    """Of valid and test, float64 [rows]."""
    chosen: dict[str, float]
    """What valid decided."""


def logistic(tables: Mapping[str, pa.Table]) -> Fitted:
    """Logistic regression on z-scores; an unknown number is the mean, and a column says that it was unknown.

    Raises:
        InputError: scikit-learn is not installed, or the tables cannot be used.
    """
    try:
        from sklearn.impute import SimpleImputer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise InputError("logistic regression needs scikit-learn: install it with `pip install 'ctrsink[study]'`") from None
    data = _matrices(tables)

    def fit(strength: float) -> Any:
        filled = SimpleImputer(add_indicator=True, keep_empty_features=True)
        return make_pipeline(filled, StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(*data["train"])

    models = {strength: fit(strength) for strength in STRENGTHS}
    columns, labels = data["valid"]
    losses = {strength: logloss(labels, model.predict_proba(columns)[:, 1]) for strength, model in models.items()}
    best = min(losses, key=losses.__getitem__)
    return Fitted({split: models[best].predict_proba(data[split][0])[:, 1] for split in ("valid", "test")}, {"strength": best})


def lightgbm(tables: Mapping[str, pa.Table], seed: int) -> Fitted:
    """Boosted trees; the log loss on valid chooses how many.

    Raises:
        InputError: LightGBM is not installed, or the tables cannot be used.
    """
    data = _matrices(tables)
    trees = _boosted(data, seed)
    return Fitted(
        {split: np.asarray(trees.predict(data[split][0])) for split in ("valid", "test")}, {"rounds": float(trees.best_iteration)}
    )


def stacked(tables: Mapping[str, pa.Table], scores: Mapping[str, np.ndarray], seed: int) -> Fitted:
    """A model's scores and the signals' columns, brought together by LightGBM.

    On the train split the model's scores know the labels, so the stack is fitted on valid, of which the model has seen nothing:
    a logistic blend of the model's logit and that of LightGBM fitted on train, then trees on top of it over all signals and both
    logits. Valid is cut into FOLDS by users; each fold is predicted by a stack of the others, and this chooses the number of
    trees (none, where they do not pay). Test is predicted by a stack of all of valid.

    Args:
        scores: the model's probabilities of valid and test, float [rows of the table].

    Raises:
        InputError: LightGBM or scikit-learn is not installed, or the tables cannot be used.
    """
    data = _matrices(tables)
    trees = _boosted(data, seed)
    both = {
        split: np.column_stack([_logit(scores[split]), np.asarray(trees.predict(data[split][0], raw_score=True))])
        for split in ("valid", "test")
    }
    columns = {split: np.column_stack([data[split][0], both[split]]) for split in both}
    labels, users = data["valid"][1], tables["valid"]["user"].combine_chunks().dictionary_encode().indices.to_numpy()
    fold = np.random.default_rng(seed).permutation(users.max() + 1)[users] % FOLDS
    folds = [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(FOLDS)]
    folds = [(rest, own) for rest, own in folds if len(own)]
    if any(len(np.unique(labels[rest])) < 2 for rest, _ in folds):
        raise InputError("a stack cannot be fitted: valid has too few impressions of both labels")
    paths = np.zeros((CORRECTIONS + 1, len(labels)))
    for rest, own in folds:
        blend = _blend(both["valid"][rest], labels[rest])
        booster = _correction(columns["valid"][rest], labels[rest], blend(both["valid"][rest]), CORRECTIONS, seed)
        paths[:, own] = blend(both["valid"][own]) + _raw_path(booster, columns["valid"][own])
    rounds = int(np.argmin([log_losses(labels, _probability(raw)).mean() for raw in paths]))
    blend = _blend(both["valid"], labels)
    raw = blend(both["test"])
    if rounds:
        booster = _correction(columns["valid"], labels, blend(both["valid"]), rounds, seed)
        raw = raw + np.asarray(booster.predict(columns["test"], raw_score=True))
    return Fitted({"valid": _probability(paths[rounds]), "test": _probability(raw)}, {"rounds": float(rounds)})


def signal_names(table: pa.Table) -> list[str]:
    """The columns that are signals."""
    return [name for name in table.column_names if name not in KEYS]


def _matrices(tables: Mapping[str, pa.Table]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Signals float32 [rows, columns] and labels [rows] by split."""
    names = signal_names(tables["train"])
    if not names:
        raise InputError("the table of train has no column of a signal")
    out: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for split, table in tables.items():
        if missing := [name for name in (*names, "label") if name not in table.column_names]:
            raise InputError(f"the table of {split} has no column {missing[0]}, which that of train has")
        labels = table["label"].to_numpy()
        if split != "test" and len(np.unique(labels)) < 2:
            raise InputError(f"the impressions of {split} have not both labels: nothing can be fitted or chosen there")
        out[split] = np.column_stack([_numbers(table, name) for name in names]), labels
    return out


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    values = table[name].to_numpy().astype(np.float32)  # null becomes NaN
    if np.isinf(values).any():
        raise InputError(f"the column {name} holds an infinite number")
    return values


def _boosted(data: Mapping[str, tuple[np.ndarray, np.ndarray]], seed: int) -> Any:
    gbm = _library()
    train, valid = (gbm.Dataset(*data[split]) for split in ("train", "valid"))
    stop = gbm.early_stopping(PATIENCE, verbose=False)
    return gbm.train(_TREES | {"seed": seed}, train, ROUNDS, valid_sets=[valid], callbacks=[stop])


def _correction(columns: np.ndarray, labels: np.ndarray, start: np.ndarray, rounds: int, seed: int) -> Any:
    gbm = _library()
    return gbm.train(_CORRECTION | {"seed": seed}, gbm.Dataset(columns, labels, init_score=start), rounds)


def _raw_path(booster: Any, columns: np.ndarray) -> np.ndarray:
    """What the first 0, 1, 2 ... trees add to each row's logit, float64 [1 + CORRECTIONS, rows]."""
    out = np.zeros((CORRECTIONS + 1, len(columns)))
    for number in range(booster.num_trees()):  # fewer, where nothing was left to split
        out[number + 1] = booster.predict(columns, raw_score=True, start_iteration=number, num_iteration=1)
    return out.cumsum(axis=0)


def _blend(logits: np.ndarray, labels: np.ndarray) -> Any:
    """Logistic regression on two logits, as a function from logits [rows, 2] to one logit [rows]."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise InputError("a stack needs scikit-learn: install it with `pip install 'ctrsink[study]'`") from None
    return LogisticRegression().fit(logits, labels).decision_function


def _library() -> Any:
    try:
        import lightgbm as gbm
    except ImportError:
        raise InputError("lightgbm is not installed: install it with `pip install 'ctrsink[study]'`") from None
    except OSError as error:
        raise InputError(f"lightgbm cannot be loaded: {first_line(error)}") from None
    return gbm


def _logit(probabilities: np.ndarray) -> np.ndarray:
    p = np.clip(probabilities, 1e-6, 1 - 1e-6)
    return np.log(p) - np.log1p(-p)


def _probability(logits: np.ndarray | Sequence[float]) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(logits)))
