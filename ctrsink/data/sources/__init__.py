"""Where a raw log comes from: each source gives its items, and its events in blocks."""

from collections.abc import Collection

from ctrsink.config.data import SourceSpec
from ctrsink.data.sources.kuairec import KuaiRec
from ctrsink.data.sources.mind import Mind
from ctrsink.data.sources.movielens import MovieLens
from ctrsink.data.sources.source import Block, Source
from ctrsink.data.sources.table import Tables

__all__ = ["Block", "Source", "open_source"]


def open_source(spec: SourceSpec, fields: Collection[str] | None = None) -> Source:
    """The log that `spec` names; nothing is read yet. `fields` of its items must be text, None: all."""
    match spec.kind:
        case "movielens":
            return MovieLens(spec.path)
        case "kuairec":
            return KuaiRec(spec.path)
        case "mind":
            return Mind(spec.path)
        case "table":
            return Tables(spec.path, spec.items, spec.columns, spec.items_columns, fields)
