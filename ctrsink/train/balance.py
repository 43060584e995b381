"""What a model's sequences cost, so that ranks can be given equally much to compute: measured once when a stage begins."""

import numpy as np

from ctrsink.config.stages import Objective
from ctrsink.families.protocol import CTRModule
from ctrsink.stream.price import Price
from ctrsink.stream.stream import SequenceSource

SAMPLE = 64  # sequences that say how many impressions a request has


def price_of(model: CTRModule, source: SequenceSource, objective: Objective) -> Price:
    """Whoever asks gets the same numbers: they are ratios of counts, of sequences that neither rank nor position choose."""
    together = 1.0
    if source.layout.examples == "per_request":
        ids = np.arange(min(SAMPLE, sum(source.per_shard)))
        together = int(source.impressions(ids).sum()) / len(source.sequences(ids))
    longest = source.some()
    flops = model.flop_count(objective)(model.drawn(source.build(longest), objective, 0))
    of_row = Price(together=together)
    rows = 1.0 if source.layout.examples == "per_user" else float(source.impressions(longest)[0]) / together
    events = float(source.costs(*source.sizes(longest), of_row)[0]) / rows
    return Price(flops.attention / max(1.0, flops.matrices * events), together)
