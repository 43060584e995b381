"""The functions of the family `din`; see families.protocol.Family."""

from typing import Any

from ctrsink.config.model.din import DinSpec
from ctrsink.families.facts import Facts
from ctrsink.families.ids.family import TARGET_NUMBERS, check, described, encode, layout, looked, merged, narrowed, portable
from ctrsink.families.protocol import CTRModule

GROUPS = DinSpec.GROUPS


def build(model: DinSpec, facts: Facts, seed: int, precision: str = "fp32") -> CTRModule:
    """See Family.build."""
    from ctrsink.families.din.model import Din
    from ctrsink.families.ids.module import seeded

    return seeded(lambda: Din(model, facts), seed, precision)


def rebuilt(plain: dict[str, Any], facts: Facts) -> CTRModule:
    """See Family.rebuilt."""
    from ctrsink.families.ids.module import settled

    return settled(build(DinSpec.model_validate(plain), facts, 0))


__all__ = [
    "GROUPS", "TARGET_NUMBERS", "build", "check", "described", "encode", "layout", "looked", "merged", "narrowed", "portable",
    "rebuilt",
]  # fmt: skip
