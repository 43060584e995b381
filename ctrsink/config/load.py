"""YAML files, `include` fragments and dotted overrides become a RunSpec; every mistake is one line that names the key."""

import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ctrsink.config.base import Section
from ctrsink.config.explain import explain
from ctrsink.config.model import FIRST_FAMILY
from ctrsink.config.run import RunSpec
from ctrsink.config.serve import ServeSpec
from ctrsink.config.study import StudySpec
from ctrsink.config.tree import MOST_BYTES, check_tree, cut, dotted, read_yaml, write_yaml
from ctrsink.errors import InputError

T = TypeVar("T", bound=Section)


def load_run(path: str | os.PathLike[str], overrides: list[str] | tuple[str, ...] = ()) -> RunSpec:
    """Read a complete run from `path` and apply `overrides` of the form `section.key=value`.

    Raises:
        InputError: the file, a fragment, a key or a value is wrong; the message names it and what is allowed.
    """
    return parse_run(_overridden(_read(Path(path), ()), overrides), str(path))


def with_overrides(spec: RunSpec, overrides: list[str], origin: str) -> RunSpec:
    """A resolved run with other values for some keys; `origin` is what errors name.

    Raises:
        InputError: an override, or what it makes of the run, is wrong.
    """
    return parse_run(_overridden(spec.model_dump(mode="json"), overrides), origin)


def _overridden(tree: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    for override in overrides:
        try:
            tree = merge(tree, _parse_override(override))
        except NoSuchEntry as error:
            raise InputError(f"{_override(override)}: {error}") from None
    return tree


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """The absolute path of a configuration that `load_run` reads, and of all that it includes, itself first."""
    found, todo = [], [Path(path).resolve()]
    while todo:
        file = todo.pop()
        found.append(file)
        includes = read_yaml(file.read_bytes(), str(file)).get("include", [])
        todo += [Path(os.path.normpath(file.parent / name)) for name in includes]
    return found


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


def load_serve(tree: dict[str, Any], overrides: list[str] | tuple[str, ...] = ()) -> ServeSpec:
    """What a service runs with: a plain mapping, and over it `overrides` of the form `section.key=value`.

    Raises:
        InputError: a key or a value is wrong.
    """
    return _parse(ServeSpec, _overridden(tree, overrides), "serve")


def _parse(section: type[T], tree: dict[str, Any], origin: str) -> T:
    check_tree(tree, origin)
    try:
        spec = section.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{origin}: {explain(error, section)}") from None
    _refuse_truths(tree, spec, (), origin)
    check_tree(spec.model_dump(mode="json"), origin)  # texts may have become numbers
    return spec


def _refuse_truths(given: Any, taken: Any, key: tuple[Any, ...], origin: str) -> None:
    """Python takes `true` for 1 where a number is wanted: nobody means that."""
    if isinstance(given, bool) and not isinstance(taken, bool):
        raise InputError(f"{origin}: {dotted(key)}: {str(given).lower()} is no number")
    if isinstance(given, dict):
        inner = taken if isinstance(taken, dict) else vars(taken) if isinstance(taken, Section) else {}
        for name, value in given.items():
            if name in inner:
                _refuse_truths(value, inner[name], (*key, name), origin)
    elif isinstance(given, list | tuple) and isinstance(taken, list | tuple):
        for number, (value, found) in enumerate(zip(given, taken, strict=False)):
            _refuse_truths(value, found, (*key, number), origin)


def dump_run(spec: RunSpec) -> str:
    """The resolved configuration as YAML; `parse_run` of it gives an equal RunSpec."""
    return write_yaml(spec.model_dump(mode="json"))


class NoSuchEntry(InputError):
    """A number names an entry that a list does not have."""


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, mapping by mapping; scalars and lists are replaced whole, but `{0: ...}` reaches into a list.

    A section `model` that names another family replaces the one below whole.

    Raises:
        NoSuchEntry: the list has no entry of that number.
    """
    return _merged(base, top, ())


def _merged(base: dict[str, Any], top: dict[str, Any], key: tuple[Any, ...]) -> dict[str, Any]:
    return {**base, **{name: _over(base.get(name), value, (*key, name)) for name, value in top.items()}}


def _over(below: Any, value: Any, key: tuple[Any, ...]) -> Any:
    if isinstance(below, dict) and isinstance(value, dict):
        # Another family has other keys: nothing of the one below is meant for it.
        other = key == ("model",) and "family" in value and value["family"] != below.get("family", FIRST_FAMILY)
        return value if other else _merged(below, value, key)
    if isinstance(below, list) and isinstance(value, dict) and all(str(name).isdecimal() for name in value):
        places = {int(name): inner for name, inner in value.items()}
        for number in places:
            if number >= len(below):
                raise NoSuchEntry(f"{dotted((*key, number))} does not exist: {_count(str(key[-1]), len(below))}, counted from 0")
        return [_over(old, places[i], (*key, i)) if i in places else old for i, old in enumerate(below)]
    return value


def _count(name: str, count: int) -> str:
    return f"there is 1 entry in {name}" if count == 1 else f"there are {count} {name}"


def _read(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in `path` over those of the files that its key `include` lists, relative to it."""
    try:
        path = path.resolve()
        if path in parents:
            raise InputError(f"{path}: includes itself through {parents[-1]}")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:  # of a name with a NUL, of a link to itself
        name = cut(str(path), 500).replace("\0", "\\0")
        raise InputError(f"cannot read the configuration {name}: {getattr(error, 'strerror', error)}") from None
    tree = read_yaml(content, str(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping at the top, got {type(tree).__name__}")
    includes = tree.pop("include", [])
    if not isinstance(includes, list) or not all(isinstance(i, str) for i in includes):
        raise InputError(f"{path}: include must be a list of file names")
    base: dict[str, Any] = {}
    for name in includes:
        base = merge(base, _read(path.parent / name, (*parents, path)))
    try:
        return merge(base, tree)
    except NoSuchEntry as error:
        raise InputError(f"{path}: {error}") from None


def _parse_override(text: str) -> dict[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise InputError(f"{_override(text)} is not of the form section.key=value")
    tree = read_yaml(value, f"{_override(text)}: the value")
    for part in reversed(key.split(".")):
        tree = {part: tree}
    check_tree(tree, _override(text))
    return tree


def _override(text: str) -> str:
    return f"override {cut(text, 120)!r}"
