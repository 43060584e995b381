"""A model's predictions on a split, over all ranks, and the metrics of them, once, on the first rank."""

import logging
import time
from collections.abc import Callable, Iterator

from ctrsink.config.train import EvaluateSpec
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.reader import Dataset
from ctrsink.dist import Topology, from_first
from ctrsink.evaluate.binned import BinnedMetrics
from ctrsink.evaluate.metrics import no_better_than_the_mean
from ctrsink.evaluate.prediction_file import PredictionFile, table_of
from ctrsink.evaluate.predictions import Predictions, predicted
from ctrsink.families.protocol import Out
from ctrsink.families.registry import source_of
from ctrsink.progress import Progress
from ctrsink.sequences.batch import Batch
from ctrsink.stream.evaluation import Share, drawn, share_of

EXACT = 10**8
"""Impressions of a split up to which the first rank holds them all, 25 bytes each and twice that for a moment, and sorts them; of
more it keeps sums."""
SAMPLE_SHARDS = 16
"""What the sample of a validation is drawn from."""
log = logging.getLogger("ctrsink.evaluate")


def predict(forward: Callable[[Batch], Out], dataset: Dataset, split: str, layout: Layout, spec: EvaluateSpec) -> Predictions:
    """Predictions of one process alone for every impression of the split in the data set's newest part.

    Older parts are left out: a model that trained on the newest has seen what came after their impressions.

    Raises:
        Diverged: a prediction is not finite: whatever is measured of such a model is no result.
    """
    share, _ = _whole(dataset, split, layout, spec, Topology())
    return Predictions.together(list(predicted(forward, share, split, Topology())))


def validation_sample(dataset: Dataset, split: str, layout: Layout, sequences: int, batch_size: int, topology: Topology) -> Share:
    """A rank's share of the sequences that a run is measured on while it trains: always the same ones, held in memory.

    They are of a few shards, as users are spread over shards by a hash, and come through a reader of their own: those that
    training has open stay so.
    """
    source = source_of(dataset.reader(), split, layout, newest=True)
    ids = drawn(source, sequences, SAMPLE_SHARDS)
    return share_of(source, ids, source.at_once(batch_size), topology.rank, topology.world).held()


def measure(forward: Callable[[Batch], Out], sample: Share, split: str, topology: Topology) -> dict[str, float]:
    """Collective: the metrics of a sample, the same on every rank.

    Raises:
        Diverged: see `predicted`.
    """
    parts = list(predicted(forward, sample, split, topology))
    return from_first(Predictions.together(parts).metrics() if topology.is_first else None, topology)


def evaluate_splits(
    forward: Callable[[Batch], Out],
    dataset: Dataset,
    layout: Layout,
    spec: EvaluateSpec,
    run_dir: str,
    step: int,
    topology: Topology,
) -> dict[str, dict[str, float]]:
    """Predict and measure every split of `spec`; the first rank writes the results, as of `step`, into the run's folder.

    Of more than EXACT impressions the AUC has a stated error, see BinnedMetrics.

    Raises:
        Diverged: see `predicted`.
    """
    out: dict[str, dict[str, float]] = {}
    for split in spec.splits:
        started = time.monotonic()
        share, count = _whole(dataset, split, layout, spec, topology)
        parts = predicted(forward, share, split, topology)
        progress = Progress(log, f"measured {split}", count, "impressions")
        with PredictionFile() as file:
            metrics = (_in_memory if count <= EXACT else _in_sums)(_written(parts, file, dataset, progress))
            out[split] = from_first(metrics, topology)
            if topology.is_first:
                file.put(run_dir, split, {"step": step, **out[split]})
                _tell(split, out[split], time.monotonic() - started)
    return out


def _whole(dataset: Dataset, split: str, layout: Layout, spec: EvaluateSpec, topology: Topology) -> tuple[Share, int]:
    """A rank's share of the split, or of the sample of it that `spec` asks for, and the impressions of all ranks."""
    source = source_of(dataset, split, layout, newest=True)
    ids = drawn(source, spec.max_sequences)
    share = share_of(source, ids, source.at_once(spec.batch_size), topology.rank, topology.world)
    return share, int(source.impressions(ids).sum())


def _written(parts: Iterator[Predictions], file: PredictionFile, dataset: Dataset, progress: Progress) -> Iterator[Predictions]:
    for part in parts:
        file.add(table_of(dataset, part))
        progress.add(len(part.labels), len(part.labels))
        yield part


def _in_memory(parts: Iterator[Predictions]) -> dict[str, float] | None:
    """Exact metrics; None where no part comes, as on all ranks but the first."""
    held = list(parts)
    if not held:
        return None
    whole = Predictions.together(held)
    held.clear()
    return whole.metrics()


def _in_sums(parts: Iterator[Predictions]) -> dict[str, float] | None:
    sums, some = BinnedMetrics(), False
    for part in parts:
        sums.add(part)
        some = True
    return sums.metrics() if some else None


def _tell(split: str, metrics: dict[str, float], seconds: float) -> None:
    done = {"progress": (f"measured {split}", 1.0)}
    log.info("%s: AUC %.4f, %d impressions, %.1f s", split, metrics["auc"], metrics["impressions"], seconds, extra=done)
    if (found := no_better_than_the_mean(metrics)) is not None:
        log.warning("%s: the model is %s: train it longer, or look at data and learning rates", split, found)
