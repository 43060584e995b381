"""What pydantic found wrong, in one line of the user's own terms: the first mistake, its key, and what is allowed there."""

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails

from ctrsink.config.tree import dotted, shown
from ctrsink.errors import did_you_mean

# What pydantic says in words of Python, or with names of classes.
_EXPECTED = {
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "dataclass_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "tuple_type": "a list",
    "list_type": "a list",
}


def explain(error: ValidationError, root: Any) -> str:
    """The first mistake in one line; the number of the others behind it.

    Args:
        root: the type that was validated, a section for the most part.
    """
    # A misspelt key explains the one that is missing, not the other way round.
    errors = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    # What has no valid value within is too short, too: that says nothing new.
    within = {e["loc"][:depth] for e in errors for depth in range(len(e["loc"]))}
    errors = [e for e in errors if e["loc"] not in within]
    # Alternatives of one value are one mistake.
    keys = list(dict.fromkeys(_key(root, e["loc"], e["type"] == "extra_forbidden")[0] for e in errors))
    text = _line(errors[0], root)
    if keys[0] and errors[0]["type"] not in ("extra_forbidden", "missing"):
        text = f"{dotted(keys[0])}: {text}"
    return text + (f" [and {len(keys) - 1} more]" if len(keys) > 1 else "")


def _line(first: ErrorDetails, root: Any) -> str:
    value = first["input"]
    key, within = _key(root, first["loc"], first["type"] == "extra_forbidden")
    match first["type"]:
        case "extra_forbidden":
            names = _names_in(within)
            return f"unknown key {dotted(key)}{did_you_mean(str(key[-1]), names)} (allowed: {', '.join(names)})"
        case "missing":
            return f"missing key {dotted(key)}"
        case "literal_error" | "enum":
            expected = first["ctx"]["expected"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
            return f"{shown(value)} is not allowed{_nearest(value, expected)} (allowed: {expected})"
        case "union_tag_invalid":
            of = first["ctx"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
            named, allowed = of["tag"], of["expected_tags"]
            return f"family {shown(named)} is not allowed{_nearest(named, allowed)} (allowed: {allowed})"
        case "value_error":
            return first["msg"].removeprefix("Value error, ")
        case kind if kind in _EXPECTED:
            return f"Input should be {_EXPECTED[kind]} (got {shown(value)})"
        case _:
            message = first["msg"].replace("Tuple", "List").replace("tuple", "list")
            return message if isinstance(value, dict | BaseModel) else f"{message} (got {shown(value)})"


def _key(root: Any, loc: tuple[int | str, ...], unknown: bool) -> tuple[tuple[int | str, ...], Any]:
    """`loc` without what pydantic puts in between for itself, the alternative of a union that it tried or `[key]`; and the type
    of what the last key stands in.

    Args:
        unknown: its last part is a key that does not exist.
    """
    found: list[int | str] = []
    annotation = within = root
    for number, part in enumerate(loc, start=1):
        if (chosen := _tagged(annotation, part)) is not None:
            annotation = chosen
            continue
        below = _below(annotation, part)
        if below is not None or (unknown and number == len(loc)):
            found.append(part)
            within, annotation = annotation, below
    return tuple(found), within


def _tagged(annotation: Any, tag: int | str) -> Any:
    """The alternative of a union that pydantic knows by this tag; None where there is none."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        if any(isinstance(m, Tag) and m.tag == tag for m in more):
            return inner
        return _tagged(inner, tag)
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for inner in get_args(annotation) if (found := _tagged(inner, tag)) is not None), None)
    return None


def _below(annotation: Any, part: int | str) -> Any:
    """What stands at a key, or at a place of a list, in a value of this type; None where there is nothing of that name."""
    for kind in _alternatives(annotation):
        origin, arguments = get_origin(kind), get_args(kind)
        if isinstance(part, int) and origin in (tuple, list):
            return arguments[0]
        if isinstance(part, str) and origin is dict:
            return arguments[1]
        if isinstance(part, str) and origin is None and issubclass(kind, BaseModel) and part in kind.model_fields:
            return kind.model_fields[part].annotation
    return None


def _alternatives(annotation: Any) -> list[Any]:
    """The plain types in an annotation such as `SinkSpec | None` or `Annotated[int, ...] | WorkersSpec`."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return [kind for inner in get_args(annotation) for kind in _alternatives(inner)]
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    return [annotation] if isinstance(annotation, type) or origin in (tuple, list, dict) else []


def _names_in(annotation: Any) -> list[str]:
    """Names of the keys that are valid in a value of this type."""
    sections = [kind for kind in _alternatives(annotation) if get_origin(kind) is None and issubclass(kind, BaseModel)]
    return [name for section in sections for name in section.model_fields]


def _nearest(value: Any, expected: str) -> str:
    return did_you_mean(str(value), [name.strip(" '") for name in expected.replace(" or ", ",").split(",")])
