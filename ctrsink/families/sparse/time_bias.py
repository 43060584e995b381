"""RelTemporal: what attention adds for how two events lie in time (SparseCTR, arXiv 2601.17836)."""

import math

import torch
from torch import nn

PARTS = 3
_DAY, _HOUR = 86400, 3600


class TimeBias(nn.Module):
    """`b_ij = -s1 floor(log2 max(dt_ij, 1)) - s2 sin(pi |hour_i - hour_j| / 24) - s3 [weekend_i != weekend_j]`.

    The coefficients are learned, of each head and here of each branch (our decision); head h of H starts at
    (2^(-8 / H))^(h - 1).
    """

    def __init__(self, branches: int, heads: int) -> None:
        super().__init__()
        slopes = torch.tensor([2 ** (-8 / heads * number) for number in range(heads)])
        self.coefficients = nn.Parameter(slopes[None, :, None].repeat(branches, 1, PARTS))

    def forward(self) -> torch.Tensor:
        """What the parts are multiplied by, [branches, H, 3]; a tensor of its own, which outlives gathered weights."""
        return -self.coefficients


def parts(query: torch.Tensor, key: torch.Tensor, out: torch.Tensor) -> None:
    """Write the three parts of pairs.

    Args:
        query: int64 [..., Q, 1] or [..., 1]; local seconds since 1970.
        key: int64 that broadcasts with it.
        out: [..., 3, Q, K]; in whose precision they are computed.
    """
    apart, hours, weekends = out.unbind(-3)
    # The exponent of a number is its floored logarithm, exactly.
    exponents = torch.frexp((query - key).clamp_(min=1).to(out.dtype)).exponent
    torch.sub(exponents, 1, out=apart)
    one, other = _phase(query, out.dtype), _phase(key, out.dtype)
    # sin(|a - b|) of angles below pi, without a sine for each pair.
    torch.sub(one[0] * other[1], one[1] * other[0], out=hours).abs_()
    torch.sub(one[2], other[2], out=weekends).abs_()


def _phase(times: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sine and cosine of pi / 24 times the hour of the day (whole hours: our decision), and 1 on Saturday and Sunday."""
    angle = (times.remainder(_DAY) // _HOUR).to(dtype) * (math.pi / 24)
    days = times.div(_DAY, rounding_mode="floor").remainder(7)  # 0 is a Thursday
    return angle.sin(), angle.cos(), ((days == 2) | (days == 3)).to(dtype)
