"""What each block of rows may read in each branch, made once per forward pass; see rows for the columns that it is made from."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from ctrsink.config.model.sparse import SparseSpec
from ctrsink.families.sparse.products import Branch, Queries
from ctrsink.families.sparse.rows import BLOCKS, CHUNKS, QUERIES, ROWS
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.behaviours import BEHAVIOURS

_NEVER = 2**62


@dataclass(frozen=True)
class Sight:
    """The rows of a batch, R, behaviours, N, and chunks, I, as the attention of every layer needs them."""

    queries: Queries
    branches: dict[str, Branch]
    """By name. Keys of `global` are the I finished chunks, then the running one of each row; of `transition` rows; of `local`
    rows, then the profile of each sequence."""
    behaviours: torch.Tensor
    """int64 [N]; their rows."""
    starts: torch.Tensor
    """int64 [I + R]; the first behaviour of each chunk, finished or running."""
    ends: torch.Tensor
    """int64 [I + R]; the behaviour after its last."""


def sight(batch: Batch, spec: SparseSpec) -> Sight:
    """Who sees what: a row itself, the profile, the `window` latest behaviours before it, summaries and ends of its chunks.

    The chunk in which what it sees ends, the running one, is each row's own. Its time, as of any summary, is that of its last
    behaviour (our decision).
    """
    inputs, axes = batch.inputs, batch.axes
    seen, times = inputs["row_seen"], inputs["row_times"]
    # A last one for what there is none of: a batch may have no behaviours or no chunks.
    rows = functional.pad(inputs["behaviour_rows"], (0, 1))
    behaviours, owner = axes[BEHAVIOURS].offsets, axes[ROWS].owner
    starts, ends = inputs["chunk_starts"], inputs["chunk_ends"]
    total = len(seen)
    number = torch.arange(total, device=seen.device)

    first, within = inputs["block_first"], torch.arange(QUERIES, device=seen.device)
    in_block = torch.where(within < inputs["block_counts"][:, None], first[:, None] + within, total)
    own_first = behaviours[owner]
    found: dict[str, Branch] = {}

    of_block = axes[BLOCKS].owner
    chunks = inputs["block_chunks"]
    which = torch.where(chunks >= 0, axes[CHUNKS].offsets[of_block][:, None] + chunks, len(starts))
    born, died = (functional.pad(inputs[name], (0, 1), value=_NEVER)[which] for name in ("chunk_born", "chunk_died"))
    start, end = functional.pad(starts, (0, 1))[which], functional.pad(ends, (0, 1))[which]
    if "global" in spec.branches:
        latest = (own_first + seen - 1).clamp(min=0)
        found["global"] = Branch(
            keys=which.clamp(max=max(len(starts) - 1, 0)),
            since=born,
            until=died,
            times=times[rows[(end - 1).clamp(min=0)]],
            own=(len(starts) + number)[:, None],
            shown=(seen > 0)[:, None],
            own_times=times[rows[latest]][:, None],
        )
    if "transition" in spec.branches:
        back = torch.arange(1, spec.transition + 1, device=seen.device)
        place = end[..., None] - back
        keys = rows[place.clamp(min=0)].flatten(1)
        exists = (place >= start[..., None]).flatten(1)
        own_place = seen[:, None] - back
        own = rows[(own_first[:, None] + own_place).clamp(min=0)]
        found["transition"] = Branch(
            keys=keys,
            since=torch.where(exists, born.repeat_interleave(spec.transition, 1), _NEVER),
            until=died.repeat_interleave(spec.transition, 1),
            times=times[keys],
            own=own,
            shown=own_place >= inputs["row_running"][:, None],
            own_times=times[own],
        )
    if "local" in spec.branches:
        reach = torch.arange(spec.window + QUERIES - 1, device=seen.device) - spec.window
        place = seen[first][:, None] + reach
        exists = (place >= 0) & (place < behaviours.diff()[of_block][:, None])
        keys = rows[torch.where(exists, behaviours[of_block][:, None] + place, 0)]
        found["local"] = Branch(
            keys=keys,
            since=torch.where(exists, place + 1, _NEVER),
            until=place + 1 + spec.window,
            times=times[keys],
            own=torch.stack([number, total + owner], 1),
            shown=torch.ones(total, 2, dtype=torch.bool, device=seen.device),
            own_times=times[:, None].expand(-1, 2),
        )
    return Sight(
        queries=Queries(in_block, seen, times),
        branches=found,
        behaviours=inputs["behaviour_rows"],
        starts=torch.cat([starts, own_first + inputs["row_running"]]),
        ends=torch.cat([ends, own_first + seen]),
    )
