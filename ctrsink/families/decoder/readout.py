"""What the click head reads: hidden states of a sequence become one vector per target (CTR-Sink, arXiv 2508.03668)."""

import torch

from ctrsink.attention.kinds import PAD, SINK
from ctrsink.attention.packed import Packed, Padded
from ctrsink.config.stages import ReadoutSpec
from ctrsink.sequences.batch import Axis


def read(hidden: torch.Tensor, packed: Packed, positions: torch.Tensor, targets: Axis, readout: ReadoutSpec) -> torch.Tensor:
    """States [N, D] -> one vector per target [T, D].

    `attend` takes the state at the target's last token. `pool` takes the mean over what the readout is `over`, up to the target;
    the target's own last token is always a member, because the target follows its history and no earlier state knows of it.

    Args:
        positions: int64 [T]; last text position of each target, in the packed row.
    """
    if readout.form == "attend":
        return hidden.index_select(0, positions)
    of, width = Padded.of(packed), max(1, targets.longest)
    length = of.kinds.shape[1]
    own = positions - packed.sequences.offsets[targets.owner]
    last = targets.pad(own, width, length - 1)[:, :, None]
    columns = torch.arange(length, device=hidden.device)
    member = (of.kinds == SINK if readout.over == "sinks" else of.kinds != PAD)[:, None, :] & (columns < last)
    # Of targets that share a history each counts its own text only.
    event = of.events[:, None, :]
    member &= ~of.candidate[:, None, :] | (event == event.transpose(1, 2).gather(1, last))
    wide = torch.promote_types(hidden.dtype, torch.float32)  # long sums and counts do not fit bfloat16
    weight = (member | (columns == last)).to(wide)
    mean = weight @ packed.sequences.pad(hidden, length).to(wide) / weight.sum(-1, keepdim=True)
    return targets.pack(mean)
