"""A model's predictions on a split, over all ranks, and the metrics of them."""

import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ctrsink import kept, storage, strict_json
from ctrsink.config.train import EvaluateSpec
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.reader import Dataset
from ctrsink.dist import Topology, gather_rows
from ctrsink.errors import Diverged
from ctrsink.evaluate.metrics import all_metrics, no_better_than_the_mean
from ctrsink.families.protocol import Out
from ctrsink.families.registry import source_of
from ctrsink.sequences.batch import Batch
from ctrsink.stream.stream import evaluation_batches

FOLDER = "evaluation"
log = logging.getLogger("ctrsink.evaluate")


@dataclass(frozen=True)
class Predictions:
    """N impressions of a split, ordered by user and event."""

    users: np.ndarray
    """int64 [N]; rows of the data set's index."""
    events: np.ndarray
    """int64 [N]; number of the event in the user's chronology."""
    labels: np.ndarray
    """int8 [N]."""
    probabilities: np.ndarray
    """float64 [N]."""

    def metrics(self) -> dict[str, float]:
        return all_metrics(self.labels, self.probabilities, self.users)


def predict(
    forward: Callable[[Batch], Out],
    dataset: Dataset,
    split: str,
    layout: Layout,
    spec: EvaluateSpec,
    topology: Topology,
) -> Predictions:
    """Predictions for every impression of the split in the data set's newest part, the same on every rank.

    Older parts are left out: a model that trained on the newest has seen what came after their impressions.

    Args:
        forward: the model; called equally often on every rank.

    Raises:
        Diverged: a prediction is not finite, on every rank: whatever is measured of such a model is no result.
    """
    source = source_of(dataset, split, layout, newest=True)
    parts = [np.empty((0, 4))]
    size = source.at_once(spec.batch_size)
    for batch in evaluation_batches(source, size, topology.rank, topology.world, spec.max_sequences):
        with torch.no_grad():
            logits = forward(batch).logits
        assert logits is not None
        of = batch.targets
        columns = [of.users, of.events, of.labels, logits.cpu().double().sigmoid()]
        parts.append(torch.stack([column.double()[of.counted] for column in columns], dim=1).numpy())
    rows = gather_rows(np.concatenate(parts), topology)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    if dead := int((~np.isfinite(rows[:, 3])).sum()):
        raise Diverged(
            f"{dead} of {len(rows)} predictions on the split {split} are not finite: the model's weights have overflowed"
        )
    return Predictions(rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64), rows[:, 2].astype(np.int8), rows[:, 3])


def write_evaluation(
    run_dir: str, step: int, split: str, dataset: Dataset, predictions: Predictions, metrics: dict[str, float]
) -> None:
    """Write a run's predictions on a split, their `metrics` and the `step` that they are of; see write_predictions."""
    table = pa.table(
        {
            "user": names_of(dataset, predictions.users),
            "event": predictions.events,
            "label": predictions.labels,
            "probability": predictions.probabilities,
        }
    )
    write_predictions(run_dir, split, table, {"step": step, **metrics})


def write_predictions(run_dir: str, split: str, table: pa.Table, metrics: dict[str, float]) -> None:
    """Write `evaluation/<split>.parquet` (`table`: user, event, label, probability) and `<split>.json` below the run's folder."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.write_bytes(storage.join(run_dir, FOLDER, f"{split}.parquet"), buffer.getvalue())
    storage.write_bytes(
        storage.join(run_dir, FOLDER, f"{split}.json"), strict_json.dumps(kept.stamped(metrics), indent=1).encode()
    )


def names_of(dataset: Dataset, users: np.ndarray) -> pa.Array:
    """Ids of users, rows of the index in any order; each shard is opened once."""
    users, numbers = np.unique(users, return_inverse=True)
    shards, starts = np.unique(dataset.index["shard"][users], return_index=True)
    rows = np.split(dataset.index["row"][users], starts[1:])
    names = [name for shard, own in zip(shards, rows, strict=True) for name in dataset.shard(int(shard)).users[own]]
    return pa.array(names, pa.string()).take(pa.array(numbers))


def evaluate_splits(
    forward: Callable[[Batch], Out],
    dataset: Dataset,
    layout: Layout,
    spec: EvaluateSpec,
    run_dir: str,
    step: int,
    topology: Topology,
) -> dict[str, dict[str, float]]:
    """Predict and measure every split of `spec`; the first rank writes the results, as of `step`, into the run's folder."""
    out: dict[str, dict[str, float]] = {}
    for split in spec.splits:
        started = time.monotonic()
        predictions = predict(forward, dataset, split, layout, spec, topology)
        out[split] = predictions.metrics()
        if topology.is_first:
            write_evaluation(run_dir, step, split, dataset, predictions, out[split])
            log.info(
                "%s: AUC %.4f, %d impressions, %.1f s",
                split,
                out[split]["auc"],
                len(predictions.labels),
                time.monotonic() - started,
            )
            if (found := no_better_than_the_mean(out[split])) is not None:
                log.warning("%s: the model is %s: train it longer, or look at data and learning rates", split, found)
    return out
