"""Where a raw log comes from: each source gives its items, and its events in blocks."""

from collections.abc import Collection, Sequence

from ctrsink.config.data import SourceSpec
from ctrsink.errors import InputError
from ctrsink.prepare.sources.kuairec import KuaiRec
from ctrsink.prepare.sources.mind import Mind
from ctrsink.prepare.sources.movielens import MovieLens
from ctrsink.prepare.sources.raw_log import Block, RawLog
from ctrsink.prepare.sources.table import Tables

__all__ = ["Block", "RawLog", "open_source"]


def open_source(spec: SourceSpec, fields: Collection[str] | None = None, told: Sequence[str] = ()) -> RawLog:
    """The log that `spec` names; nothing is read yet.

    Args:
        fields: of its items, which must be text; None: all.
        told: columns of the log that are read beside those that are mapped.

    Raises:
        InputError: a log of this kind has none of them.
    """
    if told and spec.kind != "table":
        raise InputError(f"prepare.columns: log.{told[0]} is of a log of one's own (kind table), the source is {spec.kind}")
    match spec.kind:
        case "movielens":
            return MovieLens(spec.path)
        case "kuairec":
            return KuaiRec(spec.path)
        case "mind":
            return Mind(spec.path)
        case "table":
            return Tables(spec.path, spec.items, spec.columns, spec.items_columns, fields, tuple(told))
