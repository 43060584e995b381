"""Where a raw log comes from: each source gives an EventLog."""

from ctrsink.config.data import SourceSpec
from ctrsink.data.events import EventLog, OnBadRow
from ctrsink.data.sources.movielens import read_movielens
from ctrsink.data.sources.table import read_table


def read_source(spec: SourceSpec, on_bad_row: OnBadRow = "fail") -> EventLog:
    """Read the log that `spec` names.

    Raises:
        InputError: a file is missing or empty, a column is missing, a row cannot be used (unless it is to be skipped).
    """
    if spec.kind == "movielens":
        return read_movielens(spec.path, on_bad_row)
    return read_table(spec.path, spec.items, spec.columns, on_bad_row)
