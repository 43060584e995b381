"""A seeded mutator: good input in, input out that is wrong somewhere, or odd, or still good; the same for the same seed."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# What JSON and YAML may hold where something else was meant.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3.5, -0.0, 1e308, 1e-320, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**30,
    float("nan"), float("inf"), float("-inf"), "", " ", "\0", "a\0b", "nan", "None", "null", "1e1", "0x10", "1_000", "５",
    "\ud800", "\udfff x", "\ufeff", "\u2028", "é", "e\u0301", "😀", "</s>", "<pad>", "{", "}", "{title}", "{0}", "{title!r}",
    "{title:>9}", "%s", "~", "a,b", 'a"b', "a\tb", "a\nb", "a\r\nb", "x" * 5000, "1970-01-01", "2024-13-45T99:00:00Z",
    [], {}, [[]], [{}], {"a": {}}, [1, "a", None], [None], {"": 1}, [[[[[[1]]]]]],
)  # fmt: skip
# What may stand in a file of text where it does not belong.
PIECES = (
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"'", b"\\", b"\n", b"\r", b"\r\n", b"\n\n", b",", b",,,", b"\t",
    b";", b"{", b"}", b"[", b"]", b"[" * 2000, b":", b"#", b"&a", b"*a", b"!!python/object:os.system", b"NaN", b"-Infinity",
    b"1e999", b"9" * 400, b"null", b"\\ud800", b"\\u0000", b" ", b"\xc2\xa0",
)  # fmt: skip


def mutated_bytes(chance: random.Random, content: bytes) -> bytes:
    """One to three small changes anywhere."""
    for _ in range(chance.randint(1, 3)):
        a = chance.randrange(len(content) + 1)
        b = min(len(content), a + chance.choice((0, 1, 1, 2, 7, 40)))
        match chance.randrange(6):
            case 0:
                content = content[:a] + content[b:]
            case 1:
                content = content[:a] + content[a:b] * 2 + content[b:]
            case 2:
                content = content[:a]
            case 3 if content[a : a + 1]:
                content = content[:a] + bytes([content[a] ^ (1 << chance.randrange(8))]) + content[a + 1 :]
            case _:
                content = content[:a] + chance.choice(PIECES) + content[b:]
    return content


def mutated_tree(chance: random.Random, tree: Any) -> Any:
    """One value anywhere in the tree replaced, removed, doubled or renamed."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    holder, key = chance.choice(places)
    match chance.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[chance.choice(("", "x", f"{key} ", str(key).upper(), f"{key}s"))] = holder.pop(key)
        case 2:
            holder[key] = [holder[key], holder[key]]
        case 3:
            holder[key] = {"a": holder[key]}
        case _:
            holder[key] = chance.choice(VALUES)
    return tree


def _places(tree: Any) -> Any:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list) and value:
            yield from _places(value)


def mutated_lines(chance: random.Random, rows: list[dict[str, Any]]) -> bytes:
    """JSON lines of which some have a value that does not belong there, or whose bytes are changed."""
    lines = [json.dumps(row).encode() for row in rows]
    for _ in range(chance.choice((1, 1, 1, 5))):
        number = chance.randrange(len(lines))
        lines[number] = json.dumps(mutated_tree(chance, rows[number])).encode()
    content = b"\n".join(lines) + b"\n"
    return mutated_bytes(chance, content) if chance.random() < 0.3 else content


def mutated_csv(chance: random.Random, content: bytes) -> bytes:
    """A csv file of which a cell, a line, or some bytes are changed."""
    if chance.random() < 0.4:
        return mutated_bytes(chance, content)
    lines = content.split(b"\n")
    number = chance.randrange(len(lines))
    cells = lines[number].split(b",")
    value = chance.choice(VALUES)
    cells[chance.randrange(len(cells))] = str(value).encode("utf-8", "surrogatepass")
    lines[number] = b",".join(cells)
    return b"\n".join(lines)


_CHANGES: tuple[Callable[[pa.Array, random.Random], Any], ...] = (
    lambda column, _: column.cast(pa.string()).cast(pa.binary()),
    lambda column, _: column.cast(pa.string()).dictionary_encode(),
    lambda column, _: column.cast(pa.large_string()),
    lambda column, _: pa.array([None] * len(column), column.type),
    lambda column, _: pa.nulls(len(column)),
    lambda column, _: pa.array([[value] for value in column.to_pylist()]),
    lambda column, _: pa.array([{"a": value} for value in column.to_pylist()]),
    lambda column, _: pa.array([float(number) for number in range(len(column))]),
    lambda column, _: pa.array([float(number) for number in range(len(column))], pa.float32()),
    lambda column, _: pa.array([float("nan")] * len(column)),
    lambda column, _: pa.array([2.0**60 + number for number in range(len(column))]),
    lambda column, _: pa.array([2**63 + number for number in range(len(column))], pa.uint64()),
    lambda column, _: pa.array([number % 2 == 0 for number in range(len(column))]),
    lambda column, _: pa.array(range(len(column)), pa.date32()),
    lambda column, _: pa.array(range(len(column)), pa.time64("us")),
    lambda column, _: pa.array(range(len(column)), pa.duration("s")),
    lambda column, _: pa.array(range(10**9, 10**9 + len(column)), pa.timestamp("s", "UTC")),
    lambda column, _: pa.array(range(len(column)), pa.timestamp("ns")),
    lambda column, _: pa.array([2**62] * len(column), pa.timestamp("us")),
    lambda column, _: pa.array(range(len(column))).cast(pa.decimal128(30, 3)),
)  # fmt: skip


def write_mutated_parquet(chance: random.Random, rows: list[dict[str, Any]], path: Path) -> None:
    """A Parquet file with a column of another type, another name, twice or not at all, or with changed bytes."""
    table = pa.Table.from_pylist(rows)
    number = chance.randrange(table.num_columns)
    name = table.column_names[number]
    match chance.randrange(6):
        case 0:
            table = table.drop_columns(name)
        case 1:
            table = table.append_column(name, table.column(number))
        case 2:
            table = table.rename_columns([other.upper() if other == name else other for other in table.column_names])
        case 3:
            table = table.slice(0, chance.choice((0, 1, 2)))
        case _:
            changed = chance.choice(_CHANGES)(table.column(number).combine_chunks(), chance)
            table = table.set_column(number, name, changed)
    pq.write_table(table, path, row_group_size=chance.choice((7, 1000)))
    if chance.random() < 0.25:
        path.write_bytes(mutated_bytes(chance, path.read_bytes()))
