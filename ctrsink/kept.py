"""What outlives the program that wrote it carries a version, and an older program answers what a newer one kept in one line."""

from collections.abc import Mapping
from typing import Any

from ctrsink.errors import InputError

VERSION = 1
"""Raised when an older program would misread what this one keeps. What was kept before there were versions is of the first."""


def stamped(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` and, before it, this program's version."""
    return {"version": VERSION, **tree}


def opened(tree: Any, where: str) -> dict[str, Any]:
    """What was `stamped`, as JSON gave it back.

    Raises:
        InputError: it is of a newer version; the message names `where`.
        ValueError: it was never stamped: no mapping, or a version that is no number.
    """
    version = tree.get("version", 1) if isinstance(tree, Mapping) else None
    if type(version) is not int or version < 1:
        raise ValueError("not what was written")
    if version > VERSION:
        newer = f"version {version}, this one reads up to {VERSION}"
        raise InputError(f"{where} was written by a newer ctrsink ({newer}): go on with that one")
    return {key: value for key, value in tree.items() if key != "version"}
