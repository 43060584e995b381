"""The few sequences that a run looks inside its model with, between two steps."""

from ctrsink.dataset.layout import Layout
from ctrsink.dataset.reader import Dataset
from ctrsink.families.registry import source_of
from ctrsink.sequences.batch import Batch
from ctrsink.stream.evaluation import evaluation_batches

SEQUENCES = 8


def probe_batch(dataset: Dataset, split: str, layout: Layout) -> Batch:
    """A few sequences of the split, the same at any time and on every rank.

    Raises:
        InputError: the split has none.
    """
    source = source_of(dataset, split, layout, newest=True)
    size = source.at_once(SEQUENCES)
    (batch,) = evaluation_batches(source, size, 0, 1, size)
    return batch
