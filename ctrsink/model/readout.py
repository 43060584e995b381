"""What the click head reads: hidden states of a sequence become one vector per target (CTR-Sink, arXiv 2508.03668)."""

import torch

from ctrsink.batch import PAD, SINK, Batch
from ctrsink.config.stages import ReadoutSpec


def read(hidden: torch.Tensor, batch: Batch, readout: ReadoutSpec) -> torch.Tensor:
    """States [B, L, D] -> one vector per readout slot [B, T, D].

    `attend` takes the state at the target's last token. `pool` takes the mean over what the readout is `over`, up to the target;
    the target's own last token is always a member, because the target follows its history and no earlier state knows of it.
    """
    index = batch.readout_positions[:, :, None].expand(-1, -1, hidden.shape[-1])
    own = hidden.gather(1, index)
    if readout.form == "attend":
        return own
    hidden, own = hidden.float(), own.float()  # long sums and counts do not fit bfloat16
    member = batch.kinds == SINK if readout.over == "sinks" else batch.kinds != PAD
    weight = member.to(hidden.dtype)[:, :, None]
    # Running sums give the mean up to each of many targets of one sequence in one pass; the own state is counted by itself.
    total = (hidden * weight).cumsum(1) - hidden * weight
    count = weight.cumsum(1) - weight
    return (total.gather(1, index) + own) / (count.gather(1, index[:, :, :1]) + 1)
