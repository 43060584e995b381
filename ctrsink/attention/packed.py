"""What attention knows of the positions of a packed row, and the padded form of it that torch's own kernel needs."""

from dataclasses import dataclass
from functools import cached_property

import torch

from ctrsink.sequences.batch import Axis, Batch

MULTIPLE = 8  # padded lengths are rounded up to this: fewer distinct shapes, aligned kernels


@dataclass(frozen=True)
class Slots:
    """Positions that have something of their own, n in all: sinks, or events that are asked."""

    positions: torch.Tensor
    """int64 [n]; numbers in the packed row, ascending within a sequence."""
    axis: Axis

    @property
    def width(self) -> int:
        """Slots of a sequence in the padded form; at least one, so that every rank computes them whatever its batch holds."""
        return max(1, self.axis.longest)

    @cached_property
    def valid(self) -> torch.Tensor:
        """bool [B, width]."""
        return self.axis.valid(self.width)

    @cached_property
    def padded(self) -> torch.Tensor:
        """`positions` as [B, width]; 0 where there is no slot."""
        return self.axis.pad(self.positions, self.width)


@dataclass(frozen=True)
class Packed:
    """The N positions of a batch."""

    kinds: torch.Tensor
    """uint8 [N]; PREFIX, TEXT, FEEDBACK or SINK."""
    events: torch.Tensor
    """int32 [N]; which event of its sequence a position belongs to, from 1; 0 for the prefix."""
    aligned: torch.Tensor
    """bool [N]; positions that, under `readout: sinks`, see other events through their sinks only."""
    candidate: torch.Tensor
    """bool [N]; text of a target that does not become a behaviour: no other event sees it."""
    sequences: Axis
    sinks: Slots
    asked: Slots
    """Last text position of each event that is asked: of targets, and in `per_user` sequences of every event from the first
    target on: each is a target first."""
    most: dict[str, int]
    """Of a sequence at most: `aligned` positions, `candidates` positions where a sequence has several, `asked_rows` positions
    that are either asked or such candidates, the last of `places`, see rule_dense.places, and `span`, its distinct positions."""

    @classmethod
    def of(cls, batch: Batch) -> "Packed":
        """Of a batch whose family's sequences are text."""
        read, axes = batch.inputs, batch.axes
        return cls(
            kinds=read["kinds"],
            events=read["event_ids"],
            aligned=read["aligned"],
            candidate=read["candidate"],
            sequences=axes["positions"],
            sinks=Slots(read["sink_positions"], axes["sinks"]),
            asked=Slots(read["asked_positions"], axes["asked"]),
            most={name: axes[name].longest for name in ("aligned", "candidates", "asked_rows", "places", "span")},
        )


@dataclass(frozen=True)
class Padded:
    """B sequences of L positions, K sinks and M events that are asked, padded on the right; see Packed.

    The last position of every row is padding: unused slots point there, so that no index is out of range.
    """

    kinds: torch.Tensor
    """uint8 [B, L]."""
    events: torch.Tensor
    """int32 [B, L]."""
    aligned: torch.Tensor
    """bool [B, L]."""
    candidate: torch.Tensor
    """bool [B, L]."""
    sinks: torch.Tensor
    """int64 [B, K]."""
    sink_valid: torch.Tensor
    """bool [B, K]."""
    asked: torch.Tensor
    """int64 [B, M]."""
    asked_valid: torch.Tensor
    """bool [B, M]."""
    most: dict[str, int]

    @classmethod
    def of(cls, packed: Packed) -> "Padded":
        axis = packed.sequences
        length = axis.longest + 1
        length += -length % MULTIPLE

        def within(slots: Slots) -> torch.Tensor:
            own = slots.positions - axis.offsets[slots.axis.owner]
            return slots.axis.pad(own, slots.width, length - 1)

        return cls(
            kinds=axis.pad(packed.kinds, length),
            events=axis.pad(packed.events, length),
            aligned=axis.pad(packed.aligned, length),
            candidate=axis.pad(packed.candidate, length),
            sinks=within(packed.sinks),
            sink_valid=packed.sinks.valid,
            asked=within(packed.asked),
            asked_valid=packed.asked.valid,
            most=packed.most,
        )
