"""Attention to a history by its chunks: which keys there are in a packed row, and from where to where each is seen.

SparseCTR's three branches (arXiv 2601.17836) over the sinks of CTR-Sink (arXiv 2508.03668): our own. A position sees the prefix
and its own event, up to itself, and of the behaviours before that event the latest sinks, the last sinks of each chunk, and for
each chunk the mean of the keys and the mean of the values of its sinks. No text of other events is seen, in any stage.

All keys share one softmax, with no gate and no weights of their own: a decoder may be pretrained, and knows one softmax (our
decision). A mean is taken of keys as attention gets them, rotary positions included, so its logit is the mean of its sinks'. An
addition to the logits of means, per head, may be learned from 0.
"""

from dataclasses import dataclass, field

import torch

from ctrsink.attention.inputs import AttentionInputs
from ctrsink.attention.means import means
from ctrsink.attention.packed import Packed
from ctrsink.sequences.batch import Axis, Batch


@dataclass(frozen=True)
class Keys:
    """n keys, each seen by the positions `since .. until - 1` of the packed row."""

    rows: torch.Tensor
    """int64 [n]; a position, or behind the N of them a mean."""
    since: torch.Tensor
    """int64 [n]."""
    until: torch.Tensor
    """int64 [n]."""


@dataclass(frozen=True)
class Chunked:
    """The keys of a batch of N positions; no position sees one twice."""

    positions: Keys
    """N, in their order: text and prefix, and sinks while they are among the latest."""
    ends: Keys
    """The last sinks of finished chunks when they are not any more; by `since` within a sequence."""
    finished: Keys
    """Means of chunks that no behaviour will come to, I of them; by `since` within a sequence."""
    running: Keys
    """Means of the chunks that end with the latest behaviour, one for each sink, K of them."""
    starts: torch.Tensor
    """int64 [I + K]; the first sink of each chunk, finished or running."""
    stops: torch.Tensor
    """int64 [I + K]; the sink after its last."""
    sinks: torch.Tensor
    """int64 [K]; their positions."""
    axes: dict[str, Axis]
    """`positions`, `ends`, `chunks` (of `finished`) and `sinks` (of `running`)."""

    @classmethod
    def of(cls, batch: Batch, packed: Packed) -> "Chunked":
        """Of a batch whose loader divided histories into chunks."""
        read, sinks = batch.inputs, packed.sinks.positions
        count, finished = len(packed.kinds), len(read["chunk_born"])
        place, mean, sink = (torch.arange(n, device=sinks.device) for n in (count, finished + len(sinks), len(sinks)))
        return cls(
            positions=Keys(place, place, read["seen_until"]),
            ends=Keys(sinks[read["end_sinks"]], read["end_born"], read["end_until"]),
            finished=Keys(count + mean[:finished], read["chunk_born"], read["chunk_until"]),
            running=Keys(count + mean[finished:], sinks + 1, read["running_until"]),
            starts=torch.cat([read["chunk_starts"], read["running_starts"]]),
            stops=torch.cat([read["chunk_ends"], sink + 1]),
            sinks=sinks,
            axes={name: batch.axes[name] for name in ("positions", "ends", "chunks", "sinks")},
        )

    def with_means(self, of: torch.Tensor) -> torch.Tensor:
        """Keys or values of the positions [N, G, d] -> and of the means behind them [N + I + K, G, d]."""
        return torch.cat([of, self.means(of)])

    def means(self, of: torch.Tensor) -> torch.Tensor:
        """Keys or values of the positions [N, G, d] -> of the means [I + K, G, d]."""
        return means(of.index_select(0, self.sinks), self.starts, self.stops)


@dataclass(kw_only=True)
class ChunkedInputs(AttentionInputs):
    """Of a model that reads histories by chunks."""

    chunked: Chunked
    at_means: dict[int, torch.Tensor] = field(default_factory=dict)
    """By layer, what is added to the logits of means, [H]."""
