"""Names of signals in a configuration: those of the registry, and of columns."""

from typing import Annotated

from pydantic import AfterValidator

from ctrsink.config.tree import shown
from ctrsink.errors import did_you_mean
from ctrsink.features.columns import Column
from ctrsink.features.registry import SIGNALS, find


def _known(name: str) -> str:
    if find(name) is None:
        raise ValueError(
            f"there is no signal {shown(name)}{did_you_mean(name[:60], SIGNALS)} (allowed: {', '.join(SIGNALS)}, and columns: "
            f"{_FORMS})"
        )
    return name


def _column(name: str) -> str:
    if Column.parse(name) is None:
        raise ValueError(f"{shown(name)} is no column: write {_FORMS}")
    return name


_FORMS = "log.NAME or item.NAME for a number, hashed.log.NAME or hashed.item.NAME for a category, mean.item.NAME, count.item.NAME"
SignalName = Annotated[str, AfterValidator(_known)]
ColumnName = Annotated[str, AfterValidator(_column)]
