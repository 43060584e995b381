"""Batch: the plain tensors in which data and model meet."""

import dataclasses
from dataclasses import dataclass

import torch

# What a position of the sequence is: `prefix  (text feedback sink) ... (text)`.
PAD, PREFIX, TEXT, FEEDBACK, SINK = range(5)


@dataclass(frozen=True)
class Batch:
    """B sequences of L positions, K sink slots, T readouts and M events that are asked, padded on the right.

    The last position of every row is padding: unused slots point there, so that shapes are static and no
    index is out of range.
    """

    input_ids: torch.Tensor
    """int64 [B, L]; the id at a sink is 0 and is replaced by the sink's embedding."""
    kinds: torch.Tensor
    """uint8 [B, L]; PAD, PREFIX, TEXT, FEEDBACK or SINK."""
    event_ids: torch.Tensor
    """int32 [B, L]; which event of the sequence a position belongs to, from 1; 0 for prefix and padding."""
    aligned: torch.Tensor
    """bool [B, L]; positions that, under `readout: sinks`, see other events through their sinks only."""
    candidate: torch.Tensor
    """bool [B, L]; text of a target that does not become a behaviour: no other event sees it."""
    position_ids: torch.Tensor
    """int64 [B, L]; targets that share a history begin at the same position behind it."""
    sink_positions: torch.Tensor
    """int64 [B, K]."""
    sink_valid: torch.Tensor
    """bool [B, K]."""
    signals: torch.Tensor
    """int64 [B, K, S]; bucket or category of each of the S signals."""
    sink_numbers: torch.Tensor
    """float32 [B, K, F]; z-scores, 0 where unknown or not valid."""
    sink_times: torch.Tensor
    """int64 [B, K]; seconds since 1970 of each sink's behaviour, 0 where not valid."""
    readout_positions: torch.Tensor
    """int64 [B, T]; last text position of each target."""
    readout_valid: torch.Tensor
    """bool [B, T]."""
    readout_numbers: torch.Tensor
    """float32 [B, T, G]; z-scores of each target, 0 where unknown or not valid."""
    base: torch.Tensor
    """float32 [B, T]; logit of each target's base score, which the model adds to; 0 where there is none, or not valid."""
    asked_positions: torch.Tensor
    """int64 [B, M]; last text position of each event that is asked: of targets, and in `per_user` sequences of every event from
    the first target on: each is a target first. What targets are told, and where they look, holds for all of them."""
    asked_valid: torch.Tensor
    """bool [B, M]."""
    asked_times: torch.Tensor
    """int64 [B, M]; seconds since 1970 of each such event, 0 where not valid."""
    asked_signals: torch.Tensor
    """int64 [B, M, C]; category of each of C signals."""
    asked_numbers: torch.Tensor
    """float32 [B, M, G]; z-scores, 0 where unknown or not valid."""
    labels: torch.Tensor
    """float32 [B, T]; 0 where not valid."""
    targets: torch.Tensor
    """int64 [B, T, 2]; row of the user in the data set's index and number of the event in the chronology; -1 where not valid."""
    similarity: torch.Tensor
    """float32 [B, M, K]; of the items of those asked and of sinks, 0 where unknown or later; [B, M, 0] where none is read."""

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.kinds != PAD).sum())

    @property
    def impressions(self) -> int:
        return int(self.readout_valid.sum())

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)})
