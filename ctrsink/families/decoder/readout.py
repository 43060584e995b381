"""What the click head reads: hidden states of a sequence become one vector per target (CTR-Sink, arXiv 2508.03668)."""

import torch

from ctrsink.config.stages import ReadoutSpec
from ctrsink.sequences.batch import PAD, SINK, Batch


def read(hidden: torch.Tensor, batch: Batch, readout: ReadoutSpec) -> torch.Tensor:
    """States [B, L, D] -> one vector per readout slot [B, T, D].

    `attend` takes the state at the target's last token. `pool` takes the mean over what the readout is `over`, up to the target;
    the target's own last token is always a member, because the target follows its history and no earlier state knows of it.
    """
    index = batch.readout_positions[:, :, None].expand(-1, -1, hidden.shape[-1])
    own = hidden.gather(1, index)
    if readout.form == "attend":
        return own
    last = batch.readout_positions[:, :, None]
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    member = (batch.kinds == SINK if readout.over == "sinks" else batch.kinds != PAD)[:, None, :] & (columns < last)
    # Of targets that share a history each counts its own text only.
    event = batch.event_ids[:, None, :]
    member &= ~batch.candidate[:, None, :] | (event == event.transpose(1, 2).gather(1, last))
    wide = torch.promote_types(hidden.dtype, torch.float32)  # long sums and counts do not fit bfloat16
    weight = (member | (columns == last)).to(wide)
    return weight @ hidden.to(wide) / weight.sum(-1, keepdim=True)
