"""Predictions in a run's folder: a table that may be larger than memory, and the metrics of it."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrsink import kept, storage, strict_json
from ctrsink.dataset.reader import Dataset
from ctrsink.evaluate.predictions import Predictions
from ctrsink.storage.faults import explained

FOLDER = "evaluation"
ROWS = 1 << 20
"""Of a row group."""


class PredictionFile:
    """Collects a split's predictions in a local file; `put` brings them to `evaluation/<split>.parquet` in a run's folder.

    Nothing of it is in that folder before, and what was collected is gone when the context ends.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ctrsink-evaluation-")
        self._path = Path(self._folder.name, "predictions.parquet")
        self._tables: list[pa.Table] = []
        self._waiting = 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "PredictionFile":
        return self

    def __exit__(self, *failure: object) -> None:
        if self._writer is not None:
            self._writer.close()
        self._folder.cleanup()

    def add(self, table: pa.Table) -> None:
        """Add rows with `user`, `event`, `label`, `probability`."""
        self._tables.append(table)
        self._waiting += len(table)
        if self._waiting >= ROWS:
            self._write()

    def put(self, run_dir: str, split: str, metrics: dict[str, float]) -> None:
        """Bring the predictions, at least one, and then their `metrics`, `evaluation/<split>.json`, to the run's folder."""
        self._write()
        assert self._writer is not None
        with explained(str(self._path)):
            self._writer.close()
        storage.upload(self._path, storage.join(run_dir, FOLDER, f"{split}.parquet"))
        text = strict_json.dumps(kept.stamped(metrics), indent=1)
        storage.write_bytes(storage.join(run_dir, FOLDER, f"{split}.json"), text.encode())

    def _write(self) -> None:
        if not self._tables:
            return
        table = pa.concat_tables(self._tables)
        self._tables, self._waiting = [], 0
        with explained(str(self._path)):
            self._writer = self._writer or pq.ParquetWriter(self._path, table.schema)
            self._writer.write_table(table)


def read_metrics_of(run_dir: str, split: str) -> dict[str, float | None]:
    """The metrics that were put beside a split's predictions, without the step that they are of; null for what is no number.

    Raises:
        FileNotFoundError: the run was not measured on that split.
        InputError: a newer version wrote them.
    """
    path = storage.join(run_dir, FOLDER, f"{split}.json")
    found = kept.opened(json.loads(storage.read_bytes(path)), path)
    return {name: value for name, value in found.items() if name != "step"}


def write_predictions(run_dir: str, split: str, table: pa.Table, metrics: dict[str, float]) -> None:
    """Write `evaluation/<split>.parquet` (`table`: user, event, label, probability) and `<split>.json` below the run's folder."""
    with PredictionFile() as file:
        file.add(table)
        file.put(run_dir, split, metrics)


def table_of(dataset: Dataset, predictions: Predictions) -> pa.Table:
    """With the users' ids, as logged."""
    return pa.table(
        {
            "user": names_of(dataset, predictions.users),
            "event": predictions.events,
            "label": predictions.labels,
            "probability": predictions.probabilities,
        }
    )


def names_of(dataset: Dataset, users: np.ndarray) -> pa.Array:
    """Ids of users, rows of the index in any order; each shard is opened once."""
    users, numbers = np.unique(users, return_inverse=True)
    shards, starts = np.unique(dataset.index["shard"][users], return_index=True)
    rows = np.split(dataset.index["row"][users], starts[1:])
    names = [name for shard, own in zip(shards, rows, strict=True) for name in dataset.shard(int(shard)).users[own]]
    return pa.array(names, pa.string()).take(pa.array(numbers))
