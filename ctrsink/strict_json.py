"""JSON that every reader takes, as written and as read: a number that is none is null, and no key is there twice."""

import json
import math
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """`value` as JSON text; NaN and infinities become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


class Twice(ValueError):
    """An object has a key twice: which of the two values is meant, nobody knows."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads, as object_pairs_hook: the object with these entries.

    Raises:
        Twice: a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise Twice(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
