"""Attention by chunks with FlexAttention: nothing is made [N, N].

Two numbers of a key, from where and to where it is seen, are the whole rule. Positions, with the ends of chunks behind them, are
the keys of one kernel, means of another. What both give is weighed by the sums of their exponentials: so all keys share one
softmax, and what is added to the logits of means is added to the logarithm of one sum.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

from ctrsink.attention.chunked import Chunked, ChunkedInputs, Keys
from ctrsink.attention.flex import added, kernel, whole_blocks
from ctrsink.attention.inputs import register
from ctrsink.attention.packed import Packed
from ctrsink.attention.rule_packed import BLOCK, Sees, ordered
from ctrsink.attention.table_gradient import Pairs, with_table_gradient

BACKEND = "ctrsink_chunked_flex"
_NEVER = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Spans:
    """C keys, whole blocks of them, in whatever order; int32 [C] each."""

    since: torch.Tensor
    """The first row that sees the key."""
    until: torch.Tensor
    """The row after the last one; where no row sees it, not more than `since`."""

    @classmethod
    def of(cls, *keys: Keys) -> "Spans":
        """Of these keys one behind another, and as many that nobody sees as fill the last block."""
        since, until = (torch.cat([getattr(of, name) for of in keys]).int() for name in ("since", "until"))
        missing = whole_blocks(len(since)) - len(since)
        return cls(functional.pad(since, (0, missing), value=_NEVER), functional.pad(until, (0, missing)))

    def rule(self) -> Sees:
        """A closure over plain tensors, as a compiled kernel takes it."""
        since, until = self.since, self.until

        def sees(b: torch.Tensor | None, h: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return (since[k] <= q) & (q < until[k])

        return sees

    def block_mask(self, rows: int) -> BlockMask:
        """For so many rows, whole blocks; see rule_packed.Sight.block_mask."""
        first = torch.arange(0, rows, BLOCK, device=self.since.device)[:, None]
        last = first + BLOCK - 1
        since, until = self.since.unflatten(0, (-1, BLOCK)), self.until.unflatten(0, (-1, BLOCK))
        hidden = (until.amax(1) <= first) | (since.amin(1) > last)
        whole = (since.amax(1) <= first) & (until.amin(1) > last)
        return BlockMask.from_kv_blocks(
            *ordered(~(hidden | whole)),
            *ordered(whole),
            BLOCK_SIZE=BLOCK,
            mask_mod=self.rule(),
            seq_lengths=(rows, len(self.since)),
        )


@dataclass(kw_only=True)
class ChunkedFlexInputs(ChunkedInputs):
    """What the kernels read, made once per forward pass, of the L rows that the backbone computes."""

    positions: BlockMask
    """Keys of the first kernel: the L rows, then `chunked.ends`."""
    means: BlockMask
    """Keys of the second: `chunked.finished`, then `chunked.running`."""
    slot: torch.Tensor
    """int32, of the first kernel's keys; which sink of its sequence a key is, -1: none."""
    asked_row: torch.Tensor
    """int32 [L]; see flex.FlexInputs."""
    no_rows: tuple[torch.Tensor, torch.Tensor]
    """int32 [L] each; -1."""
    no_slot: torch.Tensor
    """int32, of the second kernel's keys; -1."""
    asked: Pairs

    @property
    def length(self) -> int:
        """See flex.FlexInputs."""
        return whole_blocks(self.packed.sequences.total)


def inputs(packed: Packed, chunked: Chunked) -> ChunkedFlexInputs:
    """The inputs of a batch, with the rule of `ctrsink.attention.chunked`."""
    count, sinks, asked = packed.sequences.total, packed.sinks, packed.asked
    length = whole_blocks(count)
    # Rows behind the positions see themselves, and nothing else.
    behind = torch.arange(count, length, device=packed.kinds.device)
    positions = Spans.of(chunked.positions, Keys(behind, behind, behind + 1), chunked.ends)
    means = Spans.of(chunked.finished, chunked.running)
    none = torch.full((length,), -1, dtype=torch.int32, device=packed.kinds.device)
    slot = none.index_copy(0, sinks.positions, sinks.axis.place.int())
    owner = packed.sequences.owner[asked.positions]
    begin = ((owner * asked.width + asked.axis.place) * sinks.width + 1).int()
    slots = torch.cat([slot, slot.index_select(0, chunked.ends.rows)])
    return ChunkedFlexInputs(
        packed=packed,
        window=None,
        chunked=chunked,
        positions=positions.block_mask(length),
        means=means.block_mask(length),
        slot=functional.pad(slots, (0, len(positions.since) - len(slots)), value=-1),
        asked_row=none.index_copy(0, asked.positions, begin),
        no_rows=(none, none.clone()),
        no_slot=torch.full_like(means.since, -1),
        asked=Pairs(asked.padded, sinks.padded, _seen(packed, chunked)),
    )


def _seen(packed: Packed, chunked: Chunked) -> torch.Tensor:
    """Which of the sinks each event that is asked sees, as one of the latest or at the end of a chunk, bool [B, M, K].

    Those asked ascend, so that a key is seen by a run of them: a stroke in the sink's column.
    """
    asked, sinks = packed.asked, packed.sinks
    spans = (of.index_select(0, sinks.positions) for of in (chunked.positions.since, chunked.positions.until))
    latest = Keys(sinks.positions, *spans)
    shape = len(asked.axis.lengths), asked.width + 1, sinks.width
    edges = torch.zeros(shape, dtype=torch.int32, device=sinks.positions.device)
    place = torch.zeros_like(packed.sequences.owner).index_copy(0, sinks.positions, sinks.axis.place)
    for keys in (latest, chunked.ends):
        owner = packed.sequences.owner.index_select(0, keys.rows)
        column, first = place.index_select(0, keys.rows), asked.axis.offsets.index_select(0, owner)
        for edge, sign in ((keys.since, 1), (keys.until, -1)):
            at = torch.searchsorted(asked.positions, edge) - first
            edges.index_put_((owner, at, column), edges.new_full((), sign), accumulate=True)
    return (edges.cumsum(1)[:, :-1] > 0) & asked.valid[:, :, None] & sinks.valid[:, None, :]


def _attend(
    given: ChunkedFlexInputs,
    layer: int,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **kwargs: Any,
) -> torch.Tensor:
    """See inputs.register."""
    # Rotary embedding in fp32 leaves query and key wider than value under autocast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    at_asked, at_means, heads = given.at_asked.get(layer), given.at_means.get(layer), query.shape[1]
    scale = kwargs["scaling"]
    asks = None if at_asked is None else (given.asked_row, at_asked.transpose(0, 1).flatten(1))
    keys, values = (_keys(of, given.chunked.ends.rows, len(given.slot)) for of in (key, value))
    out, lse = kernel(query, keys, values, added(given.slot, given.no_rows, heads, None, asks), given.positions, scale)
    if at_asked is not None:
        out, lse = with_table_gradient(out, lse, at_asked, query, key, value, given.asked, scale)
    keys, values = (_means(of, given.chunked, len(given.no_slot)) for of in (key, value))
    more, lse_more = kernel(query, keys, values, added(given.no_slot, given.no_rows, heads, None, None), given.means, scale)
    if at_means is not None:
        lse_more = lse_more + at_means[:, None]
    # A softmax of two sums; that of means is 0, its logarithm minus infinity, where a row sees none.
    share = (lse_more - lse).sigmoid()[..., None]
    return torch.lerp(out.to(share.dtype), more.to(share.dtype), share).to(value.dtype).transpose(1, 2)


def _keys(of: torch.Tensor, ends: torch.Tensor, count: int) -> torch.Tensor:
    """Keys or values of all rows [1, G, L, d], and once more of the ends of chunks -> [1, G, count, d]."""
    return _filled(torch.cat([of, of.index_select(2, ends)], 2), count)


def _means(of: torch.Tensor, chunked: Chunked, count: int) -> torch.Tensor:
    """Of rows [1, G, L, d] the means of chunks, [1, G, count, d]."""
    return _filled(chunked.means(of[0].transpose(0, 1)).transpose(0, 1)[None], count)


def _filled(of: torch.Tensor, count: int) -> torch.Tensor:
    return functional.pad(of, (0, 0, 0, count - of.shape[2]))


register(BACKEND, ChunkedFlexInputs, _attend)
