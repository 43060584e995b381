"""Which families there are; a family is imported when it is used."""

import importlib
from dataclasses import dataclass
from functools import lru_cache

from ctrsink.dataset.layout import Layout
from ctrsink.dataset.reader import Dataset
from ctrsink.families.facts import Wording
from ctrsink.families.protocol import Family
from ctrsink.sequences.columns import Sequences
from ctrsink.sequences.windows import Cuts
from ctrsink.stream.stream import SequenceSource

FAMILIES = ("decoder", "din", "hstu", "sparse", "srp")


@lru_cache
def family_of(name: str) -> Family:
    """The family of that name, as `model.family` has it."""
    assert name in FAMILIES
    return importlib.import_module(f"ctrsink.families.{name}.family").FAMILY


def source_of(dataset: Dataset, split: str, layout: Layout, newest: bool = False) -> SequenceSource:
    """The sequences of a split, as the layout's family builds them; see SequenceSource."""
    return SequenceSource(dataset, split, layout, Encoder(layout.family, Wording(dataset.feedbacks, dataset.prefix)), newest)


@dataclass(frozen=True)
class Encoder:
    """A family's `encode` on one data set; another process finds the family by its name."""

    family: str
    wording: Wording

    def __call__(self, cuts: Cuts, layout: Layout) -> Sequences:
        return family_of(self.family).encode(cuts, layout, self.wording)
