"""The family `sparse`; see families.protocol.Family."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ctrsink.config.data import DataSpec
from ctrsink.config.model.sparse import SparseSpec
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.manifest import Manifest
from ctrsink.families.facts import Wording
from ctrsink.families.ids.family import IdsFamily
from ctrsink.families.protocol import CTRModule
from ctrsink.families.sparse.rows import with_chunks
from ctrsink.sequences.columns import Sequences
from ctrsink.sequences.windows import Cuts


class SparseFamily(IdsFamily):
    """SparseCTR (arXiv 2601.17836): its loader cuts histories into chunks, too."""

    spec = SparseSpec

    def layout(self, data: DataSpec, model: Any, manifest: Manifest) -> Layout:
        return replace(super().layout(data, model, manifest), chunks=model.chunks, chunking=model.chunking)

    def encode(self, cuts: Cuts, layout: Layout, wording: Wording) -> Sequences:
        return with_chunks(super().encode(cuts, layout, wording), layout)

    def module(self) -> Callable[[SparseSpec], CTRModule]:
        from ctrsink.families.sparse.model import Sparse

        return Sparse


FAMILY = SparseFamily()
