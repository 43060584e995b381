"""SRP4CTR: a transformer over behaviours is pre-trained, and candidates read it (arXiv 2407.19658)."""

from typing import Any

from ctrsink.config.model.srp import SrpSpec
from ctrsink.families.ids.family import check, encode, layout, merged, narrowed, portable
from ctrsink.families.protocol import CTRModule, Facts

GROUPS = SrpSpec.GROUPS


def build(model: SrpSpec, facts: Facts, seed: int, precision: str = "fp32") -> CTRModule:
    """See Family.build."""
    from ctrsink.families.ids.module import seeded
    from ctrsink.families.srp.model import Srp

    return seeded(lambda: Srp(model, facts), seed, precision)


def rebuilt(plain: dict[str, Any], facts: Facts) -> CTRModule:
    """See Family.rebuilt."""
    return build(SrpSpec.model_validate(plain), facts, 0)


__all__ = ["GROUPS", "build", "check", "encode", "layout", "merged", "narrowed", "portable", "rebuilt"]
