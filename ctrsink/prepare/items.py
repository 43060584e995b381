"""The item table of a data set and the tokens of every item, each tokenised once."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ctrsink.config.data import FieldSpec, PrepareSpec, TextSpec
from ctrsink.dataset.arrow import pc
from ctrsink.dataset.column_cells import numbered, stored
from ctrsink.dataset.manifest import TOKENS_SCHEMA
from ctrsink.dataset.values import one_form
from ctrsink.errors import InputError, did_you_mean, listed
from ctrsink.features.columns import Column, columns_of
from ctrsink.features.fields import field_ids
from ctrsink.prepare import tokenize
from ctrsink.prepare.lookup import Lookup
from ctrsink.prepare.render import item_texts, template_fields
from ctrsink.prepare.results import read_named, write_named

log = logging.getLogger("ctrsink.data")
_NAMED = 5  # items, in a message
_CHUNK = 50_000  # items tokenised at a time: their ids are Python lists for a moment
_OWN = ("id", "text", "item_mean", "item_count")  # columns of data sets and keys of requests, beside the names of signals


def columns_used(spec: PrepareSpec) -> tuple[str, ...]:
    """Columns of the item table that are used, each once.

    Raises:
        InputError: one is called as something else is in a data set or a request.
    """
    told = [column.name for column in columns_of(spec.columns) if column.of == "item"]
    of_key = {
        "text.item": template_fields(spec.text.item),
        "statistics.fields": [field.column for field in spec.statistics.fields],
        "columns": told,
    }
    for key, names in of_key.items():
        own = _OWN if key == "text.item" else (*_OWN, "item")  # a template may say the id
        for name in names:
            if name in own or Column.parse(name) is not None:
                mine = "my_" + name.replace(".", "_")
                raise InputError(
                    f"prepare.{key} names a column {name!r} of the item table, as something else is called in data sets and "
                    f"requests: call it otherwise, by prepare.source.items_columns={{{mine}: {name}}}; "
                    "a data set that was prepared with it is to be prepared anew"
                )
    return tuple(dict.fromkeys(name for names in of_key.values() for name in names))


@dataclass(frozen=True)
class Items:
    """Items in the order of their numbers."""

    table: pa.Table
    """As the data set keeps it: `id`, text fields, `text`."""

    @property
    def ids(self) -> pa.Array:
        return self.table.column("id").combine_chunks()

    def vocabulary_texts(self) -> Iterator[str]:
        """What a vocabulary is trained on: the texts, each cut where it has a word without end, which a warning at last names."""
        longer: list[int] = []
        for number, text in enumerate(self._texts()):
            cut = tokenize.until_endless_word(text)
            if len(cut) < len(text):
                longer.append(number)
            yield cut
        if longer:
            named = ", ".join(repr(self.ids[number].as_py()) for number in longer[:_NAMED])
            more = f" and {len(longer) - _NAMED} more" if len(longer) > _NAMED else ""
            log.warning(
                "the texts of items %s%s have a word of more than %d signs: the vocabulary is trained on them up to there",
                named,
                more,
                tokenize.LONGEST_WORD,
            )

    def _texts(self) -> Iterator[str]:
        for start in range(0, self.table.num_rows, _CHUNK):
            yield from self.table.column("text").slice(start, _CHUNK).to_pylist()

    @classmethod
    def of(cls, table: pa.Table, text: TextSpec) -> "Items":
        """Those of an item table (see check_items), with their texts rendered."""
        fields = {name: table.column(name) for name in table.column_names if name not in ("item", "id", "text")}
        pieces = (table.slice(start, _CHUNK) for start in range(0, max(table.num_rows, 1), _CHUNK))
        texts = [pa.array(item_texts(text.item, piece), pa.string()) for piece in pieces]
        return cls(pa.table({"id": table.column("item"), **fields, "text": pa.chunked_array(texts)}))

    def mapped(self, folder: str) -> "Items":
        """The same, in a file below `folder` that is mapped, and not held."""
        return Items(read_named(write_named(folder, "items", self.table)))

    def extended(self, table: pa.Table, text: TextSpec) -> "Items":
        """These, which keep their numbers and texts, and behind them the new ones of an item table.

        Raises:
            InputError: a new item lacks a field of this one's.
        """
        new = table.filter(pc.invert(pc.is_in(table.column("item"), value_set=self.ids)))
        if not new.num_rows:
            return self
        missing = [name for name in self.table.column_names if name not in ("id", "text") and name not in table.column_names]
        if missing:
            raise InputError(
                f"the item {new.column('item')[0].as_py()!r} is new and has no field {missing[0]!r}, which the data set has: "
                "give prepare.source.items a table with that column"
            )
        other = Items.of(new, text).table.select(self.table.column_names)
        return Items(pa.concat_tables([self.table, other]).combine_chunks())

    def write_ids(self, folder: str) -> str:
        """Write the lookup below `folder`; returns the file, whose name depends on the content."""
        return write_named(folder, "ids", Lookup.of(self.ids).table())

    def write_tokens(self, folder: str, tokenizer: PreTrainedTokenizerBase, text: TextSpec) -> str:
        """Write the token ids of all items, each cut to `text.max_item_tokens`; returns the file, named by its content.

        Raises:
            InputError: an item has none.
        """
        chunks, kind = [], TOKENS_SCHEMA.field("tokens").type
        fields = self.table.drop_columns("text").rename_columns({"id": "item"})
        for start in range(0, self.table.num_rows, _CHUNK):
            texts = self.table.column("text").slice(start, _CHUNK).to_pylist()
            found = tokenize.encode_items(tokenizer, text.item, fields.slice(start, _CHUNK), texts)
            ids = [tokens[: text.max_item_tokens] for tokens in found]
            for number, tokens in enumerate(ids, start):
                if not tokens:
                    raise InputError(
                        f"the text of item {self.ids[number].as_py()!r} is empty: fill in its fields in the item table, "
                        "or add text to text.item"
                    )
            chunks.append(pa.array(ids, kind))
        return write_named(folder, "tokens", pa.table({"tokens": pa.chunked_array(chunks, kind)}))

    def write_values(self, folder: str, columns: tuple[Column, ...]) -> str:
        """Write the values of all items in `columns`, by signal; returns the file, whose name depends on the content.

        Raises:
            InputError: there is no such column, or a cell is no number.
        """
        found = {column.signal: self._values(column) for column in columns}
        return write_named(folder, "values", pa.table({"": pa.nulls(self.table.num_rows), **found}))

    def groups(self, column: Column) -> np.ndarray:
        """Number of each item's value in a column, int64 [items]; -1 where it is blank.

        Raises:
            InputError: there is no such column.
        """
        return numbered(self._values(column))[0]

    def check(self, spec: PrepareSpec) -> None:
        """Raise InputError where a column is missing that signals are of, or has cells that are not what its signal is of."""
        self._require(tuple(field.column for field in spec.statistics.fields), "prepare.statistics.fields")
        for column in columns_of(spec.columns):
            if column.of == "item":
                self._values(column)

    def _values(self, column: Column) -> pa.Array:
        self._require((column.name,), f"prepare.columns {column.signal}")
        texts = self.table.column(column.name).combine_chunks()
        values, wrong = stored(column, texts)
        if wrong.any():
            row = int(wrong.argmax())
            raise InputError(
                f"prepare.columns {column.signal}: item {self.ids[row].as_py()!r} has {texts[row].as_py()!r} there, which is "
                f"no number that float32 holds: correct it, or take hashed.item.{column.name}"
            )
        return values

    def _require(self, names: tuple[str, ...], key: str) -> None:
        there = [name for name in self.table.column_names if name not in ("id", "text")]
        for name in names:
            if name not in there:
                has = f"it has {listed(there)}{did_you_mean(name, there, ': ')}" if there else "give one by prepare.source.items"
                raise InputError(f"{key}: the item table has no column {name!r}; {has}")

    def write_fields(self, folder: str, fields: tuple[FieldSpec, ...]) -> str:
        """Write the values of all items in `fields`, as numbers; returns the file, whose name depends on the content."""
        kind = TOKENS_SCHEMA.field("fields").type
        pieces = (self.table.slice(start, _CHUNK) for start in range(0, self.table.num_rows, _CHUNK))
        chunks = [pa.array(_field_rows(piece, fields), kind) for piece in pieces]
        return write_named(folder, "fields", pa.table({"fields": pa.chunked_array(chunks, kind)}))


def _field_rows(items: pa.Table, fields: tuple[FieldSpec, ...]) -> list[list[int]]:
    """The values of some items in all `fields`, as numbers."""
    cells = [(field, one_form(items.column(field.column).combine_chunks()).to_pylist()) for field in fields]
    return [
        [number for field, column in cells for number in field_ids(field.column, field.separator, column[row])]
        for row in range(items.num_rows)
    ]
