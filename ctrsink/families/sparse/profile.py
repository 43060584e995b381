"""The user's profile: one vector of a sequence, from what is known of the user when its first target is asked."""

import torch
from torch import nn

from ctrsink.config.model.sparse import SparseSpec
from ctrsink.families.ids.embedding import EventEmbedding
from ctrsink.features.registry import of_kind
from ctrsink.sequences.batch import Batch

_OF_USERS = ("user_id", "user_res", "user_std", "user_count", "recent2", "recent5", "recent20", "recent_rate")
"""Signals of a target that are the same whichever item it is."""


class Profile(nn.Module):
    """`p + W [embedding of the user id, numbers of the user]`: a learned vector, and what of these the targets are told.

    What the profile is made from is our decision. It is not the mean of behaviours, in which an early target of a `per_user`
    sequence would read its own answer, but what the sequence's first target is told of its user: that is known before them all.
    """

    def __init__(self, spec: SparseSpec) -> None:
        super().__init__()
        categories, numbers = of_kind(spec.target, numbers=False), of_kind(spec.target, numbers=True)
        self.user = categories.index("user_id") if "user_id" in categories else None
        self.numbers = [place for place, name in enumerate(numbers) if name in _OF_USERS]
        told = (spec.embedding_size if self.user is not None else 0) + len(self.numbers)
        self.shared = nn.Parameter(torch.randn(spec.width))
        self.own = nn.Linear(told, spec.width, bias=False) if told else None

    def forward(self, batch: Batch, embedding: EventEmbedding) -> torch.Tensor:
        """A profile of each sequence, [B, D]."""
        first = batch.axes["targets"].offsets[:-1]
        numbers = batch.inputs["target_numbers"][first]
        told = [numbers[:, place, None] for place in self.numbers]
        if self.user is not None:
            told.append(embedding.of("user_id", batch.inputs["target_signals"][first, self.user]))
        shared = self.shared.expand(len(first), -1)
        return shared if self.own is None else shared + self.own(torch.cat(told, -1))
