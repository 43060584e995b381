"""Rows of Parquet as requests: what a column or a field of a struct is called is a request's key, a null is JSON's null."""

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from ctrsink.errors import InputError


def check_schema(schema: pa.Schema, uri: str) -> None:
    """Raise InputError where rows of that schema are no requests, whatever their values are."""
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise InputError(f"{uri} has more than one column {name!r}: rename all but one")
    kind = id_type(schema)
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"{uri}: the column id is of the type {kind}: make it text or whole numbers")


def id_type(schema: pa.Schema) -> pa.DataType:
    """That of the column `id`; text where there is none."""
    if "id" not in schema.names:
        return pa.string()
    kind = schema.field("id").type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.string() if pa.types.is_null(kind) else kind


def trees(table: pa.RecordBatch, uri: str) -> list[dict[str, Any]]:
    """A request a row, as JSON would give it; a moment is its seconds since 1970, of a zoneless one as UTC.

    Raises:
        InputError: such as where a struct or a map has a name twice.
    """
    try:
        rows = table.to_pylist(maps_as_pydicts="strict")
    except (ValueError, KeyError, OverflowError) as error:
        raise InputError(f"{uri}: a row cannot be read: {' '.join(str(error).split())}") from None
    for row in rows:
        _seconds(row)
        history = row.get("history")
        for behaviour in history if isinstance(history, list) else ():
            if isinstance(behaviour, dict):
                _seconds(behaviour)
    return rows


def _seconds(tree: dict[str, Any]) -> None:
    moment = tree.get("timestamp")
    if isinstance(moment, datetime):
        tree["timestamp"] = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
