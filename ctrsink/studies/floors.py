"""The baselines of a study, fitted and left in folders that compare as those of runs do."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ctrsink import kept, storage, strict_json
from ctrsink.dataset.reader import Dataset
from ctrsink.evaluate.baselines import smoothed_item_mean
from ctrsink.evaluate.columns_alone import Fitted, stacked
from ctrsink.evaluate.metrics import all_metrics
from ctrsink.evaluate.prediction_file import names_of, write_predictions
from ctrsink.run.folder import write_result
from ctrsink.studies.measured import BASELINE_NAME, Impressions, Measured, rows_of

Tables = Mapping[str, pa.Table]
"""By split, with at least `user`, `event` and `label`."""
Shown = Mapping[str, Impressions]
"""By split: what the runs of a study were measured on."""
log = logging.getLogger("ctrsink.study")


@dataclass(frozen=True)
class Floor:
    """One baseline of a study."""

    folder: str
    name: str
    seed: int | None
    """None: chance plays no part."""
    data: str
    """Folder of the data set."""
    source: dict[str, str]
    """Hashes of what it is made of: while they stay the same, it does."""
    fit: Callable[[], tuple[Tables, Fitted]]
    """Probabilities of the rows of tables."""
    seconds: float = 0
    """Spent on what it builds on."""


def fit_floor(floor: Floor, shown: Shown) -> None:
    """Fit a baseline and write its predictions on the impressions `shown`, unless they are there already.

    Raises:
        InputError: what it predicts does not hold all impressions that are shown.
    """
    path = storage.join(floor.folder, BASELINE_NAME)
    source = floor.source | {split: _hash(impressions) for split, impressions in shown.items()}
    about = {"name": floor.name, "seed": floor.seed, "data": floor.data, "source": source}
    if _about(path) == about:
        return
    log.info("%s: fitting", floor.folder)
    storage.delete(path)  # written last: a folder without it holds nothing
    started = time.monotonic()
    tables, fitted = floor.fit()
    seconds = time.monotonic() - started + floor.seconds
    evaluation: dict[str, Any] = {}
    for split, impressions in shown.items():
        rows = _rows(impressions, tables[split], split)
        columns = {
            "user": impressions.names.take(pa.array(impressions.users)),
            "event": impressions.events,
            "label": impressions.labels,
            "probability": fitted.probabilities[split][rows],
        }
        evaluation[split] = all_metrics(impressions.labels, columns["probability"], impressions.users)
        write_predictions(floor.folder, split, pa.table(columns), evaluation[split])
    result = {"finished": True, "seconds": seconds, "chosen": fitted.chosen, "evaluation": evaluation}
    write_result(floor.folder, result)
    storage.write_bytes(path, strict_json.dumps(kept.stamped(about)).encode())


def _about(path: str) -> Any:
    with suppress(FileNotFoundError, ValueError):
        return kept.opened(json.loads(storage.read_bytes(path)), path)
    return None


def item_mean(dataset: Dataset) -> tuple[Tables, Fitted]:
    """The smoothed item mean, for Floor.fit."""
    tables, probabilities = {}, {}
    for split in ("valid", "test"):
        found = smoothed_item_mean(dataset, split)
        tables[split] = pa.table({"user": names_of(dataset, found.users), "event": found.events, "label": found.labels})
        probabilities[split] = found.probabilities
    return tables, Fitted(probabilities, {})


def stack(tables: Tables, runs: Mapping[str, Measured], seed: int) -> tuple[Tables, Fitted]:
    """A run's scores (`runs`: of one run, by split) beside the signals, for Floor.fit; see columns_alone.stacked."""
    own = {split: tables[split].take(pa.array(_rows(run.impressions, tables[split], split))) for split, run in runs.items()}
    scores = {split: run.probabilities for split, run in runs.items()}
    return own, stacked({"train": tables["train"], **own}, scores, seed)


def _rows(shown: Impressions, table: pa.Table, split: str) -> np.ndarray:
    users = table["user"].combine_chunks()
    return rows_of(shown, users, table["event"].to_numpy(), table["label"].to_numpy(), f"the columns of {split}")


def _hash(shown: Impressions) -> str:
    arrays = b"".join(column.tobytes() for column in (shown.users, shown.events, shown.labels))
    return storage.sha256("\n".join(shown.names.to_pylist()).encode() + arrays)
