"""Who sees which key of a chunked history, as one mask of padded sequences: columns of positions, then of means."""

from dataclasses import dataclass

import torch

from ctrsink.attention.chunked import Chunked
from ctrsink.attention.packed import Padded


@dataclass(frozen=True)
class Columns:
    """B sequences of L positions, then means of finished chunks, then of running ones: C columns."""

    of: Chunked
    sinks: torch.Tensor
    """int64 [B, K]; see Padded."""
    visible: torch.Tensor
    """bool [B, L, C]. Every row sees itself: padding may see nothing else, and a softmax over nothing is nan."""

    @classmethod
    def painted(cls, of: Chunked, padded: Padded) -> "Columns":
        """Each key is a stroke in its column, from the row that sees it first to the one that does not any more."""
        axes, (b, length) = of.axes, padded.kinds.shape
        offsets, running = axes["positions"].offsets, length + axes["chunks"].longest
        width = running + axes["sinks"].longest
        strokes = (
            (of.positions, axes["positions"], axes["positions"].place),
            (of.ends, axes["ends"], axes["positions"].place[of.ends.rows]),
            (of.finished, axes["chunks"], length + axes["chunks"].place),
            (of.running, axes["sinks"], running + axes["sinks"].place),
        )
        # One line more: what is seen to the end of a sequence may end behind the last row.
        edges = torch.zeros(b * (length + 1) * width, dtype=torch.int8, device=offsets.device)
        for keys, axis, column in strokes:
            begin = axis.owner * (length + 1) - offsets[axis.owner]
            one = torch.ones_like(column, dtype=torch.int8)
            edges.index_add_(0, (begin + keys.since) * width + column, one)
            edges.index_add_(0, (begin + keys.until) * width + column, -one)
        visible = edges.view(b, length + 1, width).cumsum(1, dtype=torch.int8)[:, :-1] > 0
        visible.diagonal(dim1=1, dim2=2).fill_(True)
        return cls(of, padded.sinks, visible)

    @property
    def length(self) -> int:
        """L."""
        return self.visible.shape[1]

    def padded(self, rows: torch.Tensor) -> torch.Tensor:
        """Keys or values of the positions, [N, G, d] -> of all columns, [B, G, C, d]."""
        return self._padded(self.of.with_means(rows)).transpose(1, 2)

    def means(self) -> torch.Tensor:
        """Which columns are means, bool [C]."""
        return torch.arange(self.visible.shape[2], device=self.visible.device) >= self.length

    def at_positions(self, weights: torch.Tensor) -> torch.Tensor:
        """Attention to columns, [B, H, R, C], as attention to positions, [B, H, R, L]: a mean's is its sinks', in equal parts."""
        of, sinks = self.of, self.of.axes["sinks"]
        owner = torch.cat([self.of.axes["chunks"].owner, sinks.owner])
        parts = torch.stack([of.starts - sinks.offsets[owner], of.stops - sinks.offsets[owner]], 1)
        parts = self._padded(torch.cat([parts.new_zeros(len(of.positions.rows), 2), parts]))[:, self.length :]
        starts, stops = parts[:, None, None].expand(-1, *weights.shape[1:3], -1, -1).unbind(-1)
        each = weights[..., self.length :].double() / (stops - starts).clamp(min=1)
        edges = each.new_zeros(*weights.shape[:3], self.sinks.shape[1] + 1)
        spread = edges.scatter_add(3, starts, each).scatter_add(3, stops, -each).cumsum(3)[..., :-1].to(weights.dtype)
        return weights[..., : self.length].scatter_add(3, self.sinks[:, None, None].expand_as(spread), spread)

    def _padded(self, keys: torch.Tensor) -> torch.Tensor:
        """[N + I + K, ...] -> [B, C, ...]."""
        axes = [self.of.axes[name] for name in ("positions", "chunks", "sinks")]
        parts = keys.split([axis.total for axis in axes])
        widths = (self.length, axes[1].longest, axes[2].longest)
        return torch.cat([axis.pad(part, width) for axis, part, width in zip(axes, parts, widths, strict=True)], 1)
