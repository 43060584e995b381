"""Scores of candidates behind histories that are kept: as of whole sequences, up to rounding, without computing these again."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from ctrsink.attention.kept import Asking, Continued, KeptInputs, Past
from ctrsink.attention.packed import Packed
from ctrsink.attention.rule_packed import Sight
from ctrsink.config.stages import Objective, ReadoutSpec
from ctrsink.dataset.layout import Layout
from ctrsink.families.decoder.told_history import ToldHistory
from ctrsink.families.protocol import Kept
from ctrsink.sequences.batch import Axis, Batch
from ctrsink.sequences.columns import Sequences

if TYPE_CHECKING:
    from ctrsink.families.decoder.model import CTRModel

LEAST = 4  # candidates in a chunk
O = TypeVar("O", Continued, Asking)  # noqa: E741


@dataclass(frozen=True)
class KeptHistory(Kept):
    """What is kept of one history, on the model's device."""

    told: ToldHistory
    past: Past
    """Of the first `known` positions of what was told."""
    known: int
    visible: torch.Tensor | None = None
    """int64 [V]; the positions that candidates see. None: all, or it was not asked yet."""
    narrow: bool = False
    """`past` is of the `visible` alone."""

    @property
    def tokens(self) -> int:
        return self.told.length

    @property
    def nbytes(self) -> int:
        return self.told.nbytes + self.past.nbytes

    def narrowed(self) -> "KeptHistory":
        if self.visible is None or self.narrow:
            return self
        return replace(self, past=self.past.only(self.visible), narrow=True)


def forgets(model: "CTRModel", layout: Layout) -> str | None:
    """See CTRModule.forgets."""
    if layout.depends_on_target:
        return "the history depends on the candidate (the signal similarity, or data.retrieve)"
    if model.sparse is not None:
        return "model.sparse reads a history by chunks, whose means are not kept"
    if any(not bias.causal for bias in model.biases):
        return "model.bias.causal is false: earlier sinks know of later ones"
    return None


def begun(sequence: Sequences, before: KeptHistory | None) -> KeptHistory:
    """See CTRModule.begun."""
    told = ToldHistory.of(sequence)
    if before is None:
        return KeptHistory(told, Past(), 0)
    shared = told.shared(before.told)
    if shared == told.length == before.told.length:
        return before
    shared = min(shared, before.known)
    if before.narrow or not shared:
        return KeptHistory(told, Past(), 0)
    return KeptHistory(told, before.past.first(shared, told.sinks_before(shared)), shared)


def recall(
    model: "CTRModel", batch: Batch, objective: Objective, histories: list[KeptHistory], of: list[int]
) -> tuple[torch.Tensor, list[KeptHistory]]:
    """See CTRModule.recall."""
    device = next(model.parameters()).device
    plan = Plan.of(batch, histories, of, objective.readout.through_sinks, model.window)
    there = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=model.mixed_precision):
        given = plan.inputs(model.asked_biases(there, Packed.of(there)), device)
        rows = plan.rows.to(device)
        embedded, positions = (one.index_select(0, rows) for one in (model.embed(there), there.inputs["position_ids"]))
        states = model.through_backbone(embedded, positions, given)
    pooled = objective.readout.form == "pool"
    kept = [_extended(*each, states, pooled) for each in zip(histories, given.histories, plan.visible, strict=True)]
    read = [_read(asking, kept[h], states, objective.readout) for asking, h in zip(given.candidates, of, strict=True)]
    with torch.autocast(device.type, enabled=False):
        logits = model.head(torch.cat(read).float(), there.inputs["readout_numbers"]) + there.inputs["base"]
    return logits, kept


@dataclass(frozen=True)
class Plan:
    """Which rows of a batch of whole sequences are computed, and what their attention is given: still on the host."""

    packed: Packed
    window: int | None
    rows: torch.Tensor
    """int64 [R], in the packed row: new positions of each history, then the candidates of each sequence."""
    histories: list[Continued]
    candidates: list[Asking]
    visible: list[torch.Tensor | None]
    """See KeptHistory, of each history."""
    slots: list[tuple[int, torch.Tensor, torch.Tensor]]
    """Of each history, then of each sequence's candidates: the sequence, which of those asked in it, which sinks they see."""

    @classmethod
    def of(cls, batch: Batch, histories: list[KeptHistory], of: list[int], sinks_only: bool, window: int | None) -> "Plan":
        packed = Packed.of(batch)
        sees = Sight.of(packed, sinks_only, window).rule()
        found = cls(packed, window, torch.empty(0, dtype=torch.int64), [], [], [], [])
        parts: list[torch.Tensor] = []

        def taken(rows: torch.Tensor) -> slice:
            start = sum(map(len, parts))
            parts.append(rows)
            return slice(start, start + len(rows))

        for number, history in enumerate(histories):
            begin, sinks, asked, _ = _sequence(packed, of.index(number))
            every = torch.arange(history.tokens)
            new = every[history.known :]
            own = torch.nonzero((asked >= history.known) & (asked < history.tokens))[:, 0]
            found.histories.append(
                Continued(
                    past=history.past,
                    rows=taken(begin + new),
                    seen=sees(None, None, begin + new[:, None], begin + every),
                    sinks=sinks,
                    new_sinks=sinks[sinks >= history.known] - history.known,
                    asked=asked[own] - history.known,
                )
            )
            found.slots.append((of.index(number), own, torch.arange(len(sinks))))
            seen = sees(None, None, begin + torch.tensor([history.tokens]), begin + every)
            found.visible.append(None if bool(seen.all()) else torch.nonzero(seen)[:, 0])
        for sequence, number in enumerate(of):
            begin, sinks, asked, length = _sequence(packed, sequence)
            history, visible = histories[number], found.visible[number]
            own = torch.nonzero(asked >= history.tokens)[:, 0]
            lengths = torch.diff(asked[own], prepend=torch.tensor([history.tokens - 1]))
            seen = torch.ones(history.tokens, dtype=torch.bool) if visible is None else _marked(visible, history.tokens)
            found.candidates.append(
                Asking(
                    history=found.histories[number],
                    rows=taken(torch.arange(begin + history.tokens, begin + length)),
                    candidates=Axis.of(lengths.numpy()),
                    chunks=Axis.of(np.add.reduceat(lengths.numpy(), np.arange(0, len(lengths), _together(seen, lengths)))),
                    visible=None if history.narrow else visible,
                    sinks=(seen.cumsum(0) - 1)[sinks[seen[sinks]]],
                )
            )
            found.slots.append((sequence, own, torch.nonzero(seen[sinks])[:, 0]))
        return replace(found, rows=torch.cat(parts))

    def inputs(self, biases: list[torch.Tensor], device: torch.device) -> KeptInputs:
        """On the device; `biases` [B, H, M, K] of all that are asked at all sinks, by layer, there already."""
        histories = [_on(one, device) for one in self.histories]
        moved = dict(zip(map(id, self.histories), histories, strict=True))
        candidates = [replace(_on(one, device), history=moved[id(one.history)]) for one in self.candidates]
        for one, (sequence, asked, sinks) in zip([*histories, *candidates], self.slots, strict=True):
            asked, sinks = asked.to(device)[:, None], sinks.to(device)
            one.at_asked.update((layer, bias[sequence][:, asked, sinks]) for layer, bias in enumerate(biases))
        return KeptInputs(packed=self.packed, window=self.window, histories=histories, candidates=candidates)


def _sequence(packed: Packed, number: int) -> tuple[int, torch.Tensor, torch.Tensor, int]:
    """Where a sequence begins in the packed row, its sinks and its asked positions, counted from there, and its length."""
    begin, end = packed.sequences.offsets[number : number + 2].tolist()
    sinks, asked = (
        of.positions[slice(*of.axis.offsets[number : number + 2].tolist())] - begin for of in (packed.sinks, packed.asked)
    )
    return begin, sinks, asked, end - begin


def _together(seen: torch.Tensor, lengths: torch.Tensor) -> int:
    """Candidates of a chunk: rows of a quarter of what they see of the history, and some at least."""
    return max(LEAST, int(seen.sum()) // (4 * max(1, int(lengths.max()))))


def _marked(positions: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.bool).index_fill(0, positions, True)


def _on(one: O, device: torch.device) -> O:
    """A copy whose own tensors are on the device, where what is kept lies already."""
    tensors = {name: value.to(device) for name, value in vars(one).items() if isinstance(value, torch.Tensor)}
    axes = {name: value.mapped(lambda of: of.to(device)) for name, value in vars(one).items() if isinstance(value, Axis)}
    return replace(one, **{"at_asked": {}, **tensors, **axes})  # pyright: ignore[reportArgumentType]


def _extended(
    history: KeptHistory, now: Continued, visible: torch.Tensor | None, states: torch.Tensor, pooled: bool
) -> KeptHistory:
    if history.known == history.tokens:
        return history if history.narrow else replace(history, visible=None if visible is None else visible.to(states.device))
    own = None
    if pooled:
        own = states[now.rows].clone()
        own = own if now.past.states is None else torch.cat([now.past.states, own])
    past = Past(tuple(now.keys), tuple(now.values), tuple(now.sink_keys), own)
    return KeptHistory(history.told, past, history.tokens, None if visible is None else visible.to(states.device))


def _read(asking: Asking, kept: KeptHistory, states: torch.Tensor, readout: ReadoutSpec) -> torch.Tensor:
    """One vector for each candidate, [C, D]; see readout.read."""
    own = states[asking.rows]
    ends = asking.candidates.offsets[1:] - 1
    if readout.form == "attend":
        return own.index_select(0, ends)
    wide = torch.promote_types(states.dtype, torch.float32)
    history = kept.past.states
    history = states[:0] if history is None else history
    if readout.over == "sinks":
        history, own = history.index_select(0, asking.history.sinks), own.index_select(0, ends)
        sums, counts = own.to(wide), torch.ones(len(ends), device=own.device)
    else:
        empty = torch.zeros(len(ends), own.shape[1], dtype=wide, device=own.device)
        sums, counts = empty.index_add(0, asking.candidates.owner, own.to(wide)), asking.candidates.offsets.diff()
    return (history.to(wide).sum(0) + sums) / (len(history) + counts)[:, None]
