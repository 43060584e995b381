"""A run's predictions, read from its folder; runs that differ in nothing but the seed are one variant."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from ctrsink import kept, storage
from ctrsink.config import RunSpec
from ctrsink.dataset.arrow import from_parquet, pc
from ctrsink.errors import InputError
from ctrsink.evaluate.prediction_file import FOLDER
from ctrsink.run.folder import CONFIG_NAME, first_difference, read_result, read_run

BASELINE_NAME = "baseline.json"
"""In place of config.yaml where no run made the predictions: `name`, `seed` (null: chance plays no part), `data`."""
_COLUMNS = ("user", "event", "label", "probability")


@dataclass(frozen=True)
class Impressions:
    """N impressions, ordered by user and event."""

    names: pa.Array
    """Ids of the U users, sorted."""
    users: np.ndarray
    """Row of `names`, [N]."""
    events: np.ndarray
    """int64 [N]."""
    labels: np.ndarray
    """int8 [N]."""


@dataclass(frozen=True)
class Measured:
    """What one run predicted."""

    folder: str
    name: str
    """Of the variant."""
    seed: int | None
    """None: chance plays no part, one run stands for all seeds."""
    data: str
    """Folder of its data set."""
    spec: RunSpec | None
    """None: a baseline."""
    result: dict[str, Any]
    """What training left in result.json; empty where it has not ended."""
    impressions: Impressions
    probabilities: np.ndarray
    """float64 [N]."""


def read_measured(folder: str, split: str) -> Measured:
    """Read the predictions of the run in `folder` on `split`.

    Raises:
        InputError: there is no run, it was not measured on that split, or its predictions are damaged or no numbers.
    """
    name, seed, data, spec = _identity(folder)
    table = read_predictions(folder, split)
    impressions, order = ordered(table)
    probabilities = table["probability"].to_numpy()[order]
    if wrong := int((~np.isfinite(probabilities)).sum()):
        raise InputError(f"{folder}: {wrong} predictions on {split} are no numbers: the model diverged; leave the run out")
    return Measured(folder, name, seed, data, spec, _result(folder), impressions, probabilities)


def _identity(folder: str) -> tuple[str, int | None, str, RunSpec | None]:
    path = storage.join(folder, BASELINE_NAME)
    if not storage.exists(storage.join(folder, CONFIG_NAME)) and storage.exists(path):
        try:
            tree = kept.opened(json.loads(storage.read_bytes(path)), path)
            return str(tree["name"]), tree["seed"], str(tree["data"]), None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is damaged: fit the baseline again") from None
    spec = read_run(folder)
    return spec.name, spec.seed, spec.data.uri, spec


def _result(folder: str) -> dict[str, Any]:
    try:
        return read_result(folder)
    except FileNotFoundError:
        return {}


def read_predictions(folder: str, split: str) -> pa.Table:
    """The table that `PredictionFile` wrote.

    Raises:
        InputError: the run was not measured on that split, or the file is damaged.
    """
    path = storage.join(folder, FOLDER, f"{split}.parquet")
    again = f"run `ctrsink evaluate --run {folder} --split {split}`"
    try:
        table = from_parquet(storage.read_bytes(path))
    except FileNotFoundError:
        raise InputError(f"{folder} was not measured on {split}: {again}") from None
    except pa.ArrowException:
        raise InputError(f"{path} is damaged: {again}") from None
    if not set(_COLUMNS) <= set(table.column_names) or not table.num_rows:
        raise InputError(f"{path} holds no predictions (columns {', '.join(_COLUMNS)}): {again}")
    return table


def ordered(table: pa.Table) -> tuple[Impressions, np.ndarray]:
    """The impressions of a table with `user`, `event` and `label`, and the order of its rows, int64 [N]."""
    column = table["user"].combine_chunks()
    names = column.unique()
    names = names.take(pc.sort_indices(names))
    users = pc.index_in(column, value_set=names).to_numpy(zero_copy_only=False)
    events = table["event"].to_numpy()
    order = np.lexsort((events, users))
    return Impressions(names, users[order], events[order], table["label"].to_numpy()[order]), order


def require_same_impressions(runs: Sequence[Measured]) -> None:
    """Raise InputError where two runs were measured on different impressions: their figures could not be compared."""
    first = runs[0]
    for run in runs[1:]:
        a, b = first.impressions, run.impressions
        if len(a.labels) != len(b.labels):
            what = f"on {len(b.labels)} impressions, {first.folder} on {len(a.labels)}"
        elif not a.names.equals(b.names) or not np.array_equal(a.users, b.users) or not np.array_equal(a.events, b.events):
            what = f"on other impressions than {first.folder}"
        elif not np.array_equal(a.labels, b.labels):
            what = f"by other labels than {first.folder}"
        else:
            continue
        raise InputError(
            f"{run.folder} was measured {what}: compare runs on one data set, with the same evaluate.max_sequences and "
            "data.examples where that is set"
        )


def variants_of(runs: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Runs by variant, in the order of their first run, by seed in each.

    Raises:
        InputError: runs of one name differ in more than the seed, or not even in that.
    """
    found: dict[str, list[Measured]] = {}
    for run in runs:
        found.setdefault(run.name, []).append(run)
    for name, own in found.items():
        own.sort(key=lambda run: -1 if run.seed is None else run.seed)
        for before, run in pairwise(own):
            both = f"{before.folder} and {run.folder} are both called {name}"
            if None in (before.seed, run.seed) or before.seed == run.seed:
                raise InputError(f"{both} and have the same seed: give one of them")
            if (before.spec is None) != (run.spec is None):
                raise InputError(f"{both}, and one is a baseline: give them different names")
            if before.spec is not None and run.spec is not None:
                difference = first_difference(before.spec.model_copy(update={"seed": run.seed}), run.spec)
                if difference is not None:
                    raise InputError(f"{both}, but {difference}: give them different names")
    return found


def rows_of(shown: Impressions, users: pa.Array, events: np.ndarray, labels: np.ndarray, where: str) -> np.ndarray:
    """The row of each impression among others, which are given by user, event and label, int64 [N].

    Args:
        where: what errors call the others.

    Raises:
        InputError: one is not among them, or has another label there.
    """
    owners = pc.index_in(users, value_set=shown.names).fill_null(-1).to_numpy(zero_copy_only=False)
    span = max(int(events.max(initial=0)), int(shown.events.max())) + 1
    keys, wanted = owners.astype(np.int64) * span + events, shown.users.astype(np.int64) * span + shown.events
    order = np.argsort(keys)
    at = np.append(order, 0)[np.searchsorted(keys, wanted, sorter=order)]
    asked = np.sort(keys[np.isin(keys, wanted)])
    if (twice := np.flatnonzero(asked[1:] == asked[:-1])).size:
        user, event = divmod(int(asked[twice[0]]), span)
        raise InputError(
            f"{where}: event {event} of user {shown.names[user].as_py()!r} is there twice: which is meant, is not told"
        )
    if not len(keys) or not np.array_equal(keys[at], wanted) or not np.array_equal(labels[at], shown.labels):
        raise InputError(f"{where}: these are not the impressions that the runs were measured on")
    return at
