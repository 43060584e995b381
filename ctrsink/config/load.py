"""YAML files, `include` fragments and dotted overrides become a RunSpec; every mistake is one line that names the key."""

import difflib
import os
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ctrsink.config.base import Section
from ctrsink.config.run import RunSpec
from ctrsink.config.study import StudySpec
from ctrsink.errors import InputError

T = TypeVar("T", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-5 is a number (YAML 1.1 reads it as text) and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def load_run(path: str | os.PathLike[str], overrides: list[str] | tuple[str, ...] = ()) -> RunSpec:
    """Read a complete run from `path` and apply `overrides` of the form `section.key=value`.

    Raises:
        InputError: the file, a fragment, a key or a value is wrong; the message names it and what is allowed.
    """
    tree = _read(Path(path), ())
    for override in overrides:
        tree = merge(tree, _parse_override(override))
    return parse_run(tree, str(path))


def parse_run(tree: dict[str, Any], origin: str) -> RunSpec:
    """Validate a plain mapping; `origin` is the file that errors name."""
    return _parse(RunSpec, tree, origin)


def load_study(path: str | os.PathLike[str]) -> tuple[StudySpec, dict[str, RunSpec]]:
    """Read a study from `path`, and the run of each of its variants by name; seed and run_dir are still those of their files.

    Raises:
        InputError: the study, or a variant, is wrong; the message names it.
    """
    study = _parse(StudySpec, _read(Path(path), ()), str(path))
    runs: dict[str, RunSpec] = {}
    for name, variant in study.variants.items():
        file, own = (variant, ()) if isinstance(variant, str) else (study.base, variant)
        assert file is not None
        try:
            runs[name] = load_run(Path(path).parent / file, (*study.overrides, *own))
        except InputError as error:
            raise InputError(f"{path}: variants.{name}: {error}") from None
    return study, runs


def _parse(section: type[T], tree: dict[str, Any], origin: str) -> T:
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{origin}: {_explain(error, section)}") from None


def dump_run(spec: RunSpec) -> str:
    """The resolved configuration as YAML; `parse_run` of it gives an equal RunSpec."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, mapping by mapping; scalars and lists are replaced whole, but `{0: ...}` reaches into a list."""
    return {**base, **{key: _over(base.get(key), value) for key, value in top.items()}}


def _over(below: Any, value: Any) -> Any:
    if isinstance(below, dict) and isinstance(value, dict):
        return merge(below, value)
    if isinstance(below, list) and isinstance(value, dict) and all(str(k).isdigit() and int(k) < len(below) for k in value):
        places = {int(k): inner for k, inner in value.items()}
        return [_over(old, places[i]) if i in places else old for i, old in enumerate(below)]
    return value


def _read(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in `path` over those of the files that its key `include` lists, relative to it."""
    path = path.resolve()
    if path in parents:
        raise InputError(f"{path}: includes itself through {parents[-1]}")
    try:
        tree = yaml.load(path.read_text("utf-8"), _Loader)
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping at the top, got {type(tree).__name__}")
    includes = tree.pop("include", [])
    if not isinstance(includes, list) or not all(isinstance(i, str) for i in includes):
        raise InputError(f"{path}: include must be a list of file names")
    base: dict[str, Any] = {}
    for name in includes:
        base = merge(base, _read(path.parent / name, (*parents, path)))
    return merge(base, tree)


def _parse_override(text: str) -> dict[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise InputError(f"override {text!r} is not of the form section.key=value")
    try:
        tree: Any = yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise InputError(f"override {text!r}: the value is not valid YAML") from None
    for part in reversed(key.split(".")):
        tree = {part: tree}
    return tree


def _explain(error: ValidationError, section: type[Section]) -> str:
    """The first mistake in one line; the number of the others behind it."""
    errors = error.errors(include_url=False)
    # A misspelt key explains the one that is missing, not the other way round.
    first = min(errors, key=lambda e: e["type"] != "extra_forbidden")
    where = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        names = _field_names(section, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1, cutoff=0.5)
        hint = f", did you mean {near[0]}?" if near else ""
        text = f"unknown key {where}{hint} (allowed: {', '.join(names)})"
    elif first["type"] == "missing":
        text = f"missing key {where}"
    elif first["type"] in ("literal_error", "enum"):
        expected = first["ctx"]["expected"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        text = f"{where}: {first['input']!r} is not allowed{_nearest(first['input'], expected)} (allowed: {expected})"
    else:
        message = first["msg"].removeprefix("Value error, ")
        value = first["input"]
        got = "" if isinstance(value, dict | BaseModel) or first["type"] == "value_error" else f" (got {value!r})"
        text = f"{where}: {message}{got}" if where else message
    more = len(errors) - 1
    return text + (f" [and {more} more]" if more else "")


def _nearest(value: Any, expected: str) -> str:
    names = [n.strip(" '") for n in expected.replace(" or ", ",").split(",")]
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def _field_names(section: type[Section], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the keys that are valid at `loc` of a section."""
    model: type[BaseModel] = section
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        found = _section_of(field.annotation) if field else None
        if found is None:
            return []
        model = found
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `SinkSpec | None` or `tuple[StageSpec, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((s for a in get_args(annotation) if (s := _section_of(a))), None)
