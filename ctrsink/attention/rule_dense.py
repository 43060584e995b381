"""Which position may attend to which, written for the few rows whose sight differs from plain causal attention."""

from dataclasses import dataclass

import torch

from ctrsink.attention.kinds import PREFIX, SINK
from ctrsink.attention.packed import Padded


@dataclass(frozen=True)
class Rows:
    """R rows of each sequence's attention."""

    positions: torch.Tensor
    """int64 [B, R]; slots that are not used point at the row's last position, which is padding."""
    visible: torch.Tensor
    """bool [B, R, L]."""


def target_rows(of: Padded, sinks_only: bool, window: int | None, asked: bool = False) -> Rows | None:
    """The rows of targets that see less than all that lies before them; None where there are none.

    Targets that share a history do not see one another (DTI, arXiv 2503.01001). With `sinks_only` (readout over sinks, form
    attend) an aligned position sees the prefix, its own event and, of other events, the sinks (CTR-Sink, arXiv 2508.03668,
    two-stage training). Rows that a window alone narrows are not among them: it narrows all, see `windowed`.

    Args:
        asked: the rows of all events that are asked too, whatever they see: they have a bias of their own.
    """
    # How many there are was counted with the sequences: nothing waits for the device.
    count = of.most["aligned" if sinks_only else "asked_rows" if asked else "candidates"]
    if count == 0:
        return None
    rows = of.aligned if sinks_only else of.candidate & (_candidates(of) > 1)[:, None]
    if asked:
        rows = rows.scatter(1, of.asked, True)
        rows[:, -1] = False  # padding, where slots that are not used point
    order = rows.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    positions = torch.where(rows.gather(1, order), order, rows.shape[1] - 1)
    return Rows(positions, visible(of, positions, sinks_only, window))


def sink_rows(of: Padded, window: int | None) -> Rows:
    """The rows of sinks; they see everything up to themselves, whatever the readout."""
    return Rows(of.sinks, visible(of, of.sinks, False, window))


def windowed(of: Padded, window: int | None) -> torch.Tensor | None:
    """What every position sees, bool [B, L, L]; None where no sequence is longer than the window."""
    if window is None or of.most["places"] <= window + 1:
        return None
    b, length = of.events.shape
    every = torch.arange(length, device=of.events.device).expand(b, length)
    return visible(of, every, False, window)


def visible(of: Padded, positions: torch.Tensor, sinks_only: bool, window: int | None) -> torch.Tensor:
    """What the rows at `positions`, int64 [B, R], see: bool [B, R, L]. Every row sees itself.

    Args:
        window: a position sees its own event and this many before it, and the prefix; None: all.
    """
    event, kind = of.events, of.kinds
    columns = torch.arange(event.shape[1], device=event.device)
    own_event = event.gather(1, positions)[:, :, None]
    same = own_event == event[:, None, :]
    seen = same | ~of.candidate[:, None, :]
    if sinks_only:
        through = ((kind == SINK) | (kind == PREFIX))[:, None, :]
        seen &= same | through | ~of.aligned.gather(1, positions)[:, :, None]
    if window is not None:
        # Padding has place 0, as the prefix has; it comes after everything else.
        place = places(of)
        distance = place.gather(1, positions)[:, :, None] - place[:, None, :]
        seen &= (distance <= window) | (kind == PREFIX)[:, None, :]
    seen &= columns <= positions[:, :, None]
    # Padding's own row may see nothing else: a softmax over nothing is nan.
    return seen | (columns == positions[:, :, None])


def places(of: Padded) -> torch.Tensor:
    """What a window counts, int32 [B, L]: numbers of events, but all candidates stand in the place of the first of them."""
    first = of.events.masked_fill(~of.candidate, torch.iinfo(torch.int32).max).amin(1, keepdim=True)
    return torch.where(of.candidate, first, of.events)


def _candidates(of: Padded) -> torch.Tensor:
    """Number of candidates of each sequence, int64 [B]."""
    first = of.candidate.clone()
    first[:, 1:] &= of.events[:, 1:] != of.events[:, :-1]
    return first.sum(1)
