"""The functions of the family `sparse`; see families.protocol.Family."""

from dataclasses import replace
from typing import Any

from ctrsink.config.data import DataSpec
from ctrsink.config.model.sparse import SparseSpec
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.manifest import Manifest
from ctrsink.families.facts import Facts
from ctrsink.families.ids import family
from ctrsink.families.ids.family import TARGET_NUMBERS, check, described, looked, merged, narrowed, portable
from ctrsink.families.protocol import CTRModule
from ctrsink.families.sparse.rows import encode

GROUPS = SparseSpec.GROUPS


def layout(data: DataSpec, model: SparseSpec, manifest: Manifest) -> Layout:
    """See Family.layout."""
    return replace(family.layout(data, model, manifest), chunks=model.chunks, chunking=model.chunking)


def build(model: SparseSpec, facts: Facts, seed: int, precision: str = "fp32") -> CTRModule:
    """See Family.build."""
    from ctrsink.families.ids.module import seeded
    from ctrsink.families.sparse.model import Sparse

    return seeded(lambda: Sparse(model, facts), seed, precision)


def rebuilt(plain: dict[str, Any], facts: Facts) -> CTRModule:
    """See Family.rebuilt."""
    from ctrsink.families.ids.module import settled

    return settled(build(SparseSpec.model_validate(plain), facts, 0))


__all__ = [
    "GROUPS", "TARGET_NUMBERS", "build", "check", "described", "encode", "layout", "looked", "merged", "narrowed", "portable",
    "rebuilt",
]  # fmt: skip
