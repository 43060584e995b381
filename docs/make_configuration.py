"""Write docs/configuration.md from the sections of the configuration: `python docs/make_configuration.py [FILE]`."""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as bounds
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ctrsink.config import RunSpec, ServeSpec, StudySpec

_SIGNS = {bounds.Ge: "≥", bounds.Gt: ">", bounds.Le: "≤", bounds.Lt: "<"}
_NAMES = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "any value"}

_HEAD = """\
# Configuration

Every key of a run, and at the end those of [a study](#a-study), which [studies.md](studies.md) explains, and of
[a service](#a-service), which [serving.md](serving.md) does. This page is made from the code by `docs/make_configuration.py`; do
not edit it by hand.

A run is a YAML file that `ctrsink train --config FILE` and the other verbs take. Three rules put it together:

- `include: [a.yaml, b.yaml]` at the top of a file reads those files first, relative to its own folder, and lays the file's own
  keys over them: mapping by mapping, while a list or a single value is replaced whole.
- `section.key=value` behind the verb changes single keys, also inside a list: `stages.0.epochs=2`.
- An unknown key, or a value that is not allowed, is answered with one line that names it and what is allowed.

A file may have 128 KiB, 50 levels and 100,000 values, aliases counted as often as they are used; whole numbers end at 2^53.

`ctrsink config show FILE [section.key=value ...]` prints the configuration that results, with every default filled in.
A configuration holds no credentials: those of `s3://` come from the environment.
"""


def page() -> str:
    """The whole page, in Markdown."""
    parts = [_HEAD]
    for name, root in {"A run": RunSpec, "A study": StudySpec, "A service": ServeSpec}.items():
        for key, section in _sections(root, ""):
            rows = [_row(key, name, field) for name, field in section.model_fields.items()]
            table = "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows])
            title = f"`{key}`{_of_family(section)}" if key else name
            parts.append(f"## {title}\n\n{_one_line(section.__doc__)}\n\n{table}\n")
    return "\n".join(parts)


def _sections(section: type[BaseModel], key: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section with its dotted key, parents before children."""
    yield key, section
    for name, field in section.model_fields.items():
        for inner in _sections_in(field.annotation):
            yield from _sections(inner, _below(key, name))


def _row(key: str, name: str, field: FieldInfo) -> str:
    inner = next(iter(_sections_in(field.annotation)), None)
    several = len(_sections_in(field.annotation)) > 1
    of_inner = "" if inner is None else "A section for each family." if several else _one_line(inner.__doc__)
    meaning = " ".join(filter(None, [of_inner, _one_line(field.description)]))
    if not meaning:
        raise SystemExit(f"{_below(key, name)} has no docstring: say in ctrsink/config what it means")
    allowed = _type(field.annotation, _below(key, name), _limits(field))
    cells = [f"`{name}`", allowed, _default(field, inner), meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _limits(field: FieldInfo) -> str:
    found = [f"{_SIGNS[type(m)]} {getattr(m, type(m).__name__.lower()):g}" for m in field.metadata if type(m) in _SIGNS]
    return " " + " and ".join(found) if found else ""


def _type(annotation: Any, key: str, limits: str = "") -> str:
    """The type in words, `limits` behind a plain one."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " / ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is types.NoneType else _type(a, key, limits) for a in arguments)
    if origin is Annotated:
        return _type(arguments[0], key, _limits(arguments[1]) if isinstance(arguments[1], FieldInfo) else "")
    if origin is tuple:
        if arguments[-1] is not Ellipsis:
            return f"[{', '.join(_type(a, key) for a in arguments)}]"
        return f"list of {_type(arguments[0], key)}"
    if origin is dict:
        return f"mapping from {_type(arguments[0], key)} to {_type(arguments[1], key)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        family = _of_family(annotation)
        anchor = f"{key}{family}".replace(".", "").replace("`", "").replace(" ", "-")
        return f"[{family.split('`')[1] if family else 'section'}](#{anchor})"
    return _NAMES[annotation] + limits


def _default(field: FieldInfo, inner: type[BaseModel] | None) -> str:
    if field.is_required():
        return "**required**"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    value = json.dumps(field.default, ensure_ascii=False)
    return value if value == "null" and inner else f"`{value}`"


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections inside an annotation such as `SinkSpec | None`, `tuple[StageSpec, ...]` or a union of families."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _sections_in(inner)]


def _of_family(section: type[BaseModel]) -> str:
    """Behind the key of a section that is one of several families."""
    field = section.model_fields.get("family")
    return "" if field is None else f" of the family `{get_args(field.annotation)[0]}`"


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("configuration.md")
    target.write_text(page(), "utf-8")
