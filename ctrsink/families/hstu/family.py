"""The functions of the family `hstu`; see families.protocol.Family."""

from typing import Any

from ctrsink.config.model.hstu import HstuSpec
from ctrsink.families.facts import Facts
from ctrsink.families.ids.family import (
    TARGET_NUMBERS,
    check,
    described,
    encode_padded,
    layout,
    looked,
    merged,
    narrowed,
    portable,
)
from ctrsink.families.protocol import CTRModule

encode = encode_padded
GROUPS = HstuSpec.GROUPS


def build(model: HstuSpec, facts: Facts, seed: int, precision: str = "fp32") -> CTRModule:
    """See Family.build."""
    from ctrsink.families.hstu.model import Hstu
    from ctrsink.families.ids.module import seeded

    return seeded(lambda: Hstu(model, facts), seed, precision)


def rebuilt(plain: dict[str, Any], facts: Facts) -> CTRModule:
    """See Family.rebuilt."""
    from ctrsink.families.ids.module import settled

    return settled(build(HstuSpec.model_validate(plain), facts, 0))


__all__ = [
    "GROUPS", "TARGET_NUMBERS", "build", "check", "described", "encode", "layout", "looked", "merged", "narrowed", "portable",
    "rebuilt",
]  # fmt: skip
