"""SparseCTR: sparse attention over the chunks of a long history (arXiv 2601.17836)."""

from dataclasses import replace
from typing import Any

from ctrsink.config.data import DataSpec
from ctrsink.config.model.sparse import SparseSpec
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.manifest import Manifest
from ctrsink.families.ids import family
from ctrsink.families.ids.family import check, merged, narrowed, portable
from ctrsink.families.protocol import CTRModule, Facts
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
    return build(SparseSpec.model_validate(plain), facts, 0)


__all__ = ["GROUPS", "build", "check", "encode", "layout", "merged", "narrowed", "portable", "rebuilt"]
