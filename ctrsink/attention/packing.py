"""Packing: the sequences of a batch lie one behind another in a single row, so that no layer computes on padding."""

from dataclasses import dataclass

import torch

from ctrsink.sequences.batch import PAD, Batch


@dataclass(frozen=True)
class Packing:
    """Where the N tokens of a packed row lie in the padded form [B, L]."""

    shape: tuple[int, int]
    places: torch.Tensor
    """int64 [N]; index of each token in the flattened [B * L], ascending."""

    @classmethod
    def of(cls, batch: Batch) -> "Packing":
        b, length = batch.kinds.shape
        return cls((b, length), (batch.kinds != PAD).flatten().nonzero()[:, 0])

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] -> [N, ...]."""
        return padded.flatten(0, 1).index_select(0, self.places)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [B, L, ...], zeros at padding."""
        b, length = self.shape
        flat = packed.new_zeros(b * length, *packed.shape[1:])
        return flat.index_copy(0, self.places, packed).unflatten(0, self.shape)

    def find(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions in their rows, int64 [B, K] -> indices in the packed row; of padding, some index that exists."""
        b, length = self.shape
        starts = torch.arange(b, device=positions.device)[:, None] * length
        return torch.searchsorted(self.places, starts + positions).clamp(max=len(self.places) - 1)
