"""Batch: what data and models meet in, the rows of its sequences one behind another, nothing padded."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class Axis:
    """Rows of B sequences, one sequence's behind another's; how many each has is known on the host."""

    offsets: torch.Tensor
    """int64 [B + 1]; where each sequence's rows begin and, at last, end."""
    lengths: np.ndarray
    """int64 [B]; on the host."""

    @classmethod
    def of(cls, lengths: np.ndarray) -> "Axis":
        return cls(torch.from_numpy(np.append(0, lengths.cumsum())), lengths)

    @cached_property
    def total(self) -> int:
        """Rows of all sequences."""
        return int(self.lengths.sum())

    @cached_property
    def longest(self) -> int:
        """Rows of the sequence with most of them."""
        return int(self.lengths.max(initial=0))

    @cached_property
    def owner(self) -> torch.Tensor:
        """The sequence of each row, int64 [total]."""
        sequences = torch.arange(len(self.lengths), device=self.offsets.device)
        return sequences.repeat_interleave(self.offsets.diff(), output_size=self.total)

    @cached_property
    def place(self) -> torch.Tensor:
        """The number of each row within its sequence, int64 [total]."""
        return torch.arange(self.total, device=self.offsets.device) - self.offsets[self.owner]

    def valid(self, width: int) -> torch.Tensor:
        """Which rows of the padded form exist, bool [B, width]."""
        return torch.arange(width, device=self.offsets.device) < self.offsets.diff()[:, None]

    def pad(self, packed: torch.Tensor, width: int, value: float = 0) -> torch.Tensor:
        """[total, ...] -> [B, width, ...], with `value` where no row is; `width` is at least `longest`."""
        flat = packed.new_full((len(self.lengths) * width, *packed.shape[1:]), value)
        return flat.index_copy(0, self.owner * width + self.place, packed).unflatten(0, (len(self.lengths), width))

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """[B, W, ...] -> [total, ...]."""
        return padded.flatten(0, 1).index_select(0, self.owner * padded.shape[1] + self.place)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Axis":
        return Axis(change(self.offsets), self.lengths)


@dataclass(frozen=True)
class Targets:
    """T impressions whose click is to be predicted, those of a sequence behind one another."""

    labels: torch.Tensor
    """float32 [T]."""
    users: torch.Tensor
    """int64 [T]; row of the user in the data set's index."""
    events: torch.Tensor
    """int64 [T]; number of the event in the user's chronology."""
    times: torch.Tensor
    """int64 [T]; seconds since 1970."""
    counted: torch.Tensor
    """bool [T]; False where a sequence only fills the batch."""

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Targets":
        return Targets(**{f.name: change(getattr(self, f.name)) for f in dataclasses.fields(self)})


@dataclass(frozen=True)
class Batch:
    """B sequences with their targets, and what a family's model reads of them."""

    targets: Targets
    inputs: dict[str, torch.Tensor]
    """By name, as the family's `encode` gave them; each has a row for each row of its axis."""
    axes: dict[str, Axis]
    """By name; `targets` is among them."""
    tokens: int
    """Rows that the cost of a sequence is counted in."""
    impressions: int
    """Targets that are counted."""
    costs: dict[str, int] = field(default_factory=dict)
    """By name, what the family's `encode` counted, summed over the sequences."""
    units: int | None = None
    """What the loss is a sum over, where that is not impressions."""

    @property
    def device(self) -> torch.device:
        return self.targets.labels.device

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch of changed tensors, each of the same shape."""
        return dataclasses.replace(
            self,
            targets=self.targets.mapped(change),
            inputs={name: change(value) for name, value in self.inputs.items()},
            axes={name: axis.mapped(change) for name, axis in self.axes.items()},
        )

    def to(self, device: torch.device | str) -> "Batch":
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))
