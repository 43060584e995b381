"""A plain tree out of a YAML text, with limits: whoever wrote it, reading it ends soon, and no value in it surprises a worker."""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from ctrsink.errors import InputError

MOST_BYTES, MOST_VALUES, DEEPEST = 2**17, 100_000, 50  # a second of reading
_MERGED = 10_000  # keys that `<<` may bring into one mapping
_LARGEST_INTEGER, _LARGEST_FLOAT = 2**53, 3.4e38  # exact in JSON and fp64; in the range of fp32


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-5 is a number (YAML 1.1 reads it as text) and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for name in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if name in names:
                raise yaml.constructor.ConstructorError(None, None, f"the key {cut(name, 60)} stands twice", node.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Every level of `<<` may double the keys of the one below: the sum is looked at before they are copied."""
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        below = [inner for value in merged for inner in (value.value if isinstance(value, yaml.SequenceNode) else [value])]
        if sum(len(inner.value) for inner in below) > _MERGED:
            raise yaml.constructor.ConstructorError(None, None, f"<< brings in more than {_MERGED} keys", node.start_mark)
        super().flatten_mapping(node)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that _Loader, or a reader of YAML 1.1, would take for something else."""


# A date stays text, which a key reads as its own: YAML fails on one that is none, such as 2024-13-01. Numbers are those of YAML
# 1.2: 010 and 1:30 are none (1.1 has 8 and 90), which a key of numbers reads as ten or refuses.
_RULES = {
    "int": (r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_Loader.yaml_implicit_resolvers = {
    start: [(tag, rule) for tag, rule in rules if tag.rpartition(":")[2] not in ("timestamp", *_RULES)]
    for start, rules in _Loader.yaml_implicit_resolvers.items()
}
for _kind, (_rule, _starts) in _RULES.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"({_rule})$"), list(_starts))


def read_yaml(text: str | bytes, origin: str) -> Any:
    """The plain tree in `text`; `origin` is the file that errors name.

    Raises:
        InputError: it is no YAML, too large, or `check_tree` refuses it.
    """
    if len(text) > MOST_BYTES:
        raise InputError(f"{origin}: a configuration of more than {MOST_BYTES // 1024} KiB is none")
    try:
        tree = yaml.load(text, _Loader)
    except RecursionError:
        raise InputError(f"{origin}: nested more than {DEEPEST} levels deep, or an alias that contains itself") from None
    except (KeyError, AttributeError, IndexError, OverflowError):  # of PyYAML, where a tag such as !!bool does not fit its value
        raise InputError(f"{origin} is not valid YAML: a tag does not fit its value, or a sign is none") from None
    except (yaml.YAMLError, ValueError) as error:  # the second of a date that is none, or a number without end
        raise InputError(f"{origin} is not valid YAML: {cut(' '.join(str(error).split(';')[0].split()), 300)}") from None
    check_tree(tree, origin)
    return tree


def write_yaml(tree: Any) -> str:
    """A plain tree as YAML, of which `read_yaml` gives an equal one."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def check_tree(tree: Any, origin: str) -> None:
    """Refuse what is no plain, finite tree of mappings, lists, texts, numbers, true, false and null.

    Raises:
        InputError: aliases make it endless or immense, it is nested too deeply, or holds what nothing can take.
    """
    for count, (key, value) in enumerate(_walk(tree, (), origin)):
        problem = (
            _problem(value) if count < MOST_VALUES else f"more than {MOST_VALUES:,} values: do its aliases repeat themselves?"
        )
        if problem is not None:
            raise InputError(f"{origin}: {dotted(key)}{': ' if key else ''}{problem}")


def dotted(key: tuple[Any, ...]) -> str:
    """A key as users write it, `stages.0.lr`, never longer than a line."""
    return cut(".".join(map(str, key)), 120)


def shown(value: Any) -> str:
    """`value` as it stands in a message: one that is long is cut."""
    if isinstance(value, str):
        return repr(cut(value, 60))
    if isinstance(value, dict | list | tuple) and len(value) > 20:
        return f"{len(value):,} values"
    return cut(repr(value), 100)


def cut(text: str, most: int) -> str:
    """`text`, its middle left out where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 20]}...{text[-10:]}"


def _walk(value: Any, key: tuple[Any, ...], origin: str) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every key and value, also those that aliases repeat."""
    if len(key) > DEEPEST:
        raise InputError(f"{origin}: {dotted(key[:3])}: nested more than {DEEPEST} levels deep, or an alias that contains itself")
    yield key, value
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str | int) or isinstance(name, bool) or _problem(name):
                raise InputError(f"{origin}: {dotted((*key, ''))}{shown(name)} is no name of a key: put it in quotes")
            yield from _walk(inner, (*key, name), origin)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _walk(inner, (*key, number), origin)


def _problem(value: Any) -> str | None:
    """Why nothing can take the value, or None."""
    match value:
        case None | bool() | dict() | list() | tuple():
            return None
        case int():
            return None if abs(value) <= _LARGEST_INTEGER else "a whole number beyond 2^53 is out of range"
        case float():
            return None if math.isfinite(value) and abs(value) <= _LARGEST_FLOAT else f"the number {value} is out of range"
        case str():
            if "\0" in value:
                return f"{shown(value)} holds a NUL character, which no name and no path may"
            return None if _is_unicode(value) else f"{shown(value)} holds half a surrogate pair, which is no character"
        case _:
            return f"{shown(value)} is neither text nor number: put it in quotes"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
