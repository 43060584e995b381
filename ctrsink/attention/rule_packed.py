"""Which token of a packed row sees which, from six numbers of each token; blocks of it without the pairs inside them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask

from ctrsink.attention.kinds import PREFIX, SINK
from ctrsink.attention.packed import Packed

BLOCK = 128
Sees = Callable[[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, head, query, key) -> bool, of indices in the packed row that broadcast; the first two are not read."""


@dataclass(frozen=True)
class Sight:
    """Segment descriptors of the N tokens of a packed row, int32 [N] each."""

    sequence: torch.Tensor
    """Ascending."""
    event: torch.Tensor
    shown: torch.Tensor
    """To other events: 2 a sink or prefix, 1 other tokens, 0 a candidate."""
    asks: torch.Tensor
    """The least `shown` of other events that this token sees, 1 or 2."""
    reach: torch.Tensor
    """What a window counts; of the prefix, which every window reaches, the largest number."""
    oldest: torch.Tensor
    """The least `reach` that this token sees."""

    @classmethod
    def of(cls, packed: Packed, sinks_only: bool, window: int | None) -> "Sight":
        """The rule of `ctrsink.attention.rule_dense.visible`, in its arguments."""
        prefix = packed.kinds == PREFIX
        through = (packed.kinds == SINK) | prefix
        place = places(packed)
        return cls(
            sequence=packed.sequences.owner.int(),
            event=packed.events,
            shown=(1 + through.int()).masked_fill(packed.candidate, 0),
            asks=1 + packed.aligned.int() if sinks_only else torch.ones_like(packed.events),
            reach=place.masked_fill(prefix, torch.iinfo(torch.int32).max),
            oldest=torch.zeros_like(packed.events) if window is None else place - window,
        )

    def rule(self) -> Sees:
        """A closure over plain tensors, as a compiled kernel takes it."""
        sequence, event, shown, asks, reach, oldest = (
            self.sequence, self.event, self.shown, self.asks, self.reach, self.oldest,
        )  # fmt: skip

        def sees(b: torch.Tensor | None, h: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            other = shown[k] >= asks[q]
            return (sequence[q] == sequence[k]) & (k <= q) & ((event[q] == event[k]) | other) & (reach[k] >= oldest[q])

        return sees

    def block_mask(self, sees: Sees, size: int = BLOCK) -> BlockMask:
        """What the kernel computes: no block that is hidden whole, and without `sees` those that are seen whole.

        Both are told from the least and the largest numbers of a block, [N / size] each; where these leave it open, `sees`
        decides by pair.
        """
        least, most = self._bounds(size)
        count = least.sequence.shape[0]
        later = torch.ones(count, count, dtype=torch.bool, device=least.sequence.device).triu(1)
        # Rows are queries, columns keys.
        strangers = (most.event[None, :] < least.event[:, None]) | (least.event[None, :] > most.event[:, None])
        hidden = later | (most.sequence[None, :] < least.sequence[:, None])
        hidden |= strangers & (most.shown[None, :] < least.asks[:, None])
        hidden |= most.reach[None, :] < least.oldest[:, None]
        siblings = torch.maximum(most.event[None, :], most.event[:, None]) == torch.minimum(
            least.event[None, :], least.event[:, None]
        )
        whole = ~later & (least.sequence[None, :] == most.sequence[:, None])
        whole &= siblings | (least.shown[None, :] >= most.asks[:, None])
        whole &= least.reach[None, :] >= most.oldest[:, None]
        whole.fill_diagonal_(False)
        partial = ~(hidden | whole)
        return BlockMask.from_kv_blocks(
            *ordered(partial),
            *ordered(whole),
            BLOCK_SIZE=size,
            mask_mod=sees,
            seq_lengths=(len(self.sequence), len(self.sequence)),
        )

    def padded(self, length: int) -> "Sight":
        """Behind the tokens so many more that there are `length`: a sequence of their own, which no token sees."""
        missing = length - len(self.sequence)

        def longer(values: torch.Tensor, more: int) -> torch.Tensor:
            return torch.cat([values, (values[-1:] + more).expand(missing)])

        return Sight(**{name: longer(values, int(name == "sequence")) for name, values in vars(self).items()})

    def _bounds(self, size: int) -> tuple["Sight", "Sight"]:
        """The least and the largest of each number in each block; one that is not full is never seen whole."""
        count = len(self.sequence)
        split = {k: v.unflatten(0, (-1, size)) for k, v in vars(self.padded(count + -count % size)).items()}
        return Sight(**{k: v.amin(1) for k, v in split.items()}), Sight(**{k: v.amax(1) for k, v in split.items()})


def places(packed: Packed) -> torch.Tensor:
    """What a window counts, int32 [N]; see rule_dense.places."""
    of, most = packed.sequences, torch.iinfo(torch.int32).max
    first = torch.full((len(of.lengths),), most, dtype=torch.int32, device=packed.events.device)
    first = first.scatter_reduce(0, of.owner, packed.events.masked_fill(~packed.candidate, most), "amin")
    return torch.where(packed.candidate, first[of.owner], packed.events)


def ordered(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [Q, K] blocks -> how many in each row, int32 [1, 1, Q], and which, those first, int32 [1, 1, Q, K]."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True).int()
    return chosen.sum(1, dtype=torch.int32)[None, None], order[None, None]
