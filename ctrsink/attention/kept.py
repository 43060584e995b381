"""Attention of the last positions of sequences whose earlier ones are kept: a history is computed once, and asked often.

What sees what is the rule of whole sequences (rule_packed). All candidates of a sequence see the same of its history, and nothing
of one another, so a few of them at a time stand behind a copy of what they see: no row is as long as all candidates are.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ctrsink.attention.inputs import OwnAttention
from ctrsink.sequences.batch import Axis


@dataclass(frozen=True)
class Past:
    """What a decoder keeps of the first P positions of a sequence, of which K are sinks."""

    keys: tuple[torch.Tensor, ...] = ()
    """[H_kv, P, d] by layer, positions in them; none where P is 0."""
    values: tuple[torch.Tensor, ...] = ()
    sink_keys: tuple[torch.Tensor, ...] = ()
    """[heads, K, d] by layer that has an inter-sink bias: that module's own keys."""
    states: torch.Tensor | None = None
    """[P, D] after the final norm, where readouts are of all positions."""

    @property
    def nbytes(self) -> int:
        own = () if self.states is None else (self.states,)
        return sum(of.nbytes for of in (*self.keys, *self.values, *self.sink_keys, *own))

    def first(self, positions: int, sinks: int) -> "Past":
        """Of the first `positions`, of which `sinks` are sinks."""
        if not positions:
            return Past()
        # Copies: a part would hold the memory of the whole.
        return Past(
            tuple(of[:, :positions].clone() for of in self.keys),
            tuple(of[:, :positions].clone() for of in self.values),
            tuple(of[:, :sinks].clone() for of in self.sink_keys),
            None if self.states is None else self.states[:positions].clone(),
        )

    def only(self, positions: torch.Tensor) -> "Past":
        """Keys and values at these positions: enough to be asked, not to be continued."""
        keys, values = (tuple(of.index_select(1, positions) for of in each) for each in (self.keys, self.values))
        return replace(self, keys=keys, values=values, sink_keys=())


@dataclass
class Continued:
    """A history of P positions, and the R last of them, which are computed now."""

    past: Past
    rows: slice
    """Of what is computed."""
    seen: torch.Tensor
    """bool [R, P]."""
    sinks: torch.Tensor
    """int64 [K]; their positions."""
    new_sinks: torch.Tensor
    """int64 [k]; those of the last k of them among the R."""
    asked: torch.Tensor
    """int64 [m]; positions, among the R, of events that are asked."""
    at_asked: dict[int, torch.Tensor] = field(default_factory=dict)
    """Their bias at sinks [H, m, K], by layer."""
    tables: dict[int, torch.Tensor] = field(default_factory=dict)
    """Inter-sink bias [k, K], from the layer's hook."""
    sink_keys: list[torch.Tensor] = field(default_factory=list)
    """See Past; of all K, from the layer's hook."""
    keys: list[torch.Tensor] = field(default_factory=list)
    """By layer, of all P."""
    values: list[torch.Tensor] = field(default_factory=list)

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add keys and values of the R positions, [H_kv, R, d]."""
        for kept, own, into in ((self.past.keys, key, self.keys), (self.past.values, value, self.values)):
            if not kept:
                into.append(own.clone())
            else:
                into.append(torch.cat([kept[layer], own], 1) if own.shape[1] else kept[layer])

    def mask(self, layer: int, dtype: torch.dtype) -> torch.Tensor:
        """float [1, 1 or H, R, P]."""
        hidden = ~self.seen[None]
        parts = []
        if (table := self.tables.pop(layer, None)) is not None:
            parts.append((self.new_sinks, table[None]))
        if (at_asked := self.at_asked.get(layer)) is not None and len(self.asked):
            parts.append((self.asked, at_asked))
        heads = max((of.shape[0] for _, of in parts), default=1)
        bias = torch.zeros(heads, *self.seen.shape, dtype=torch.float32, device=self.seen.device)
        for rows, of in parts:
            bias[:, rows[:, None], self.sinks] += of.float()
        return bias.masked_fill(hidden, float("-inf")).to(dtype)[None]


@dataclass
class Asking:
    """The C candidates behind a history, a few of them in each of several chunks: a row of a chunk is no longer than these."""

    history: Continued
    rows: slice
    """Of what is computed; one candidate's behind another's."""
    candidates: Axis
    """Rows of each candidate."""
    chunks: Axis
    """Rows of each chunk."""
    visible: torch.Tensor | None
    """int64 [V], ascending; positions of the history that they see. None: all, or what is kept is just these."""
    sinks: torch.Tensor
    """int64 [k]; those that they see, counted among the V."""
    at_asked: dict[int, torch.Tensor] = field(default_factory=dict)
    """Bias [H, C, k] of their last rows at these sinks, by layer."""
    masks: dict[int, torch.Tensor] = field(default_factory=dict)
    """float [chunks, 1, W, V + W], by V, made when it is first needed: the same for all layers."""

    def attend(
        self, layer: int, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Of [H, R, d] and [H_kv, R, d]: [R, H, d]."""
        keys, values = self.history.keys[layer], self.history.values[layer]
        if self.visible is not None:
            keys, values = (of.index_select(1, self.visible) for of in (keys, values))
        width = self.chunks.longest
        own = [self.chunks.pad(of.transpose(0, 1), width).transpose(1, 2) for of in (query, key, value)]
        # Copying the history for each chunk costs little beside reading it once for each row.
        before = [of.expand(len(self.chunks.lengths), *of.shape) for of in (keys, values)]
        every_key, every_value = (torch.cat(pair, 2) for pair in zip(before, own[1:], strict=True))
        mask = self._mask(keys.shape[1], query.dtype)
        out = self.chunks.pack(sdpa_attention_forward(module, own[0], every_key, every_value, mask, **kwargs)[0])
        if (bias := self.at_asked.get(layer)) is not None and bias.shape[2]:
            lasts = self.candidates.offsets[1:] - 1
            again = self._lasts(query.index_select(1, lasts), key, value, keys, values, bias, kwargs["scaling"])
            out = out.index_copy(0, lasts, again.to(out.dtype))
        return out

    def _mask(self, seen: int, dtype: torch.dtype) -> torch.Tensor:
        if seen not in self.masks:
            width = self.chunks.longest
            candidate = self.chunks.pad(self.candidates.owner, width, -1)
            hidden = (candidate[:, :, None] != candidate[:, None, :]).logical_or_(
                torch.ones(width, width, dtype=torch.bool, device=candidate.device).triu(1)
            )
            mask = torch.zeros(len(candidate), 1, width, seen + width, dtype=dtype, device=candidate.device)
            mask[:, 0, :, seen:].masked_fill_(hidden, float("-inf"))
            self.masks[seen] = mask
        return self.masks[seen]

    def _lasts(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """The last row of each candidate, [H, C, d], with its bias: [C, H, d]."""
        width = self.candidates.longest
        groups, seen = query.shape[0] // key.shape[0], keys.shape[1]
        key, value = (self.candidates.pad(of.transpose(0, 1), width).permute(2, 0, 1, 3) for of in (key, value))
        key, value, keys, values = (of.repeat_interleave(groups, 0) for of in (key, value, keys, values))
        past = query @ keys.transpose(1, 2) * scaling
        past[:, :, self.sinks] += bias.to(past.dtype)
        own = (query[:, :, None] @ key.transpose(2, 3))[:, :, 0] * scaling
        scores = torch.cat([past, own.masked_fill(~self.candidates.valid(width), float("-inf"))], -1)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
        out = weights[..., :seen] @ values + (weights[:, :, None, seen:] @ value)[:, :, 0]
        return out.transpose(0, 1)


@dataclass(kw_only=True)
class KeptInputs(OwnAttention):
    """Rows to compute: of each history its new positions, then of each sequence its candidates."""

    histories: list[Continued]
    candidates: list[Asking]

    def attend(
        self, layer: int, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """See inputs.register."""
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
        for of in self.histories:
            of.extend(layer, key[0, :, of.rows], value[0, :, of.rows])
            if of.seen.shape[0]:
                mask, keys, values = of.mask(layer, query.dtype), of.keys[layer][None], of.values[layer][None]
                out[of.rows] = sdpa_attention_forward(module, query[:, :, of.rows], keys, values, mask, **kwargs)[0][0]
        for of in self.candidates:
            own = (each[0, :, of.rows] for each in (query, key, value))
            out[of.rows] = of.attend(layer, module, *own, **kwargs)
        return out[None]
