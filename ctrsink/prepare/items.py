"""The item table of a data set and the tokens of every item, each tokenised once."""

import logging
from dataclasses import dataclass
from functools import cached_property

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
from ctrsink.prepare.results import write_named

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

    @property
    def texts(self) -> list[str]:
        return self.table.column("text").to_pylist()

    def vocabulary_texts(self) -> list[str]:
        """What a vocabulary is trained on: the texts, each cut where it has a word without end, which a warning names."""
        texts = self.texts
        cut = [tokenize.until_endless_word(text) for text in texts]
        longer = [number for number, text in enumerate(texts) if len(cut[number]) < len(text)]
        if longer:
            named = ", ".join(repr(self.ids[number].as_py()) for number in longer[:_NAMED])
            more = f" and {len(longer) - _NAMED} more" if len(longer) > _NAMED else ""
            log.warning(
                "the texts of items %s%s have a word of more than %d signs: the vocabulary is trained on them up to there",
                named,
                more,
                tokenize.LONGEST_WORD,
            )
        return cut

    @classmethod
    def of(cls, table: pa.Table, text: TextSpec) -> "Items":
        """Those of an item table (see check_items), with their texts rendered."""
        fields = {name: table.column(name) for name in table.column_names if name not in ("item", "id", "text")}
        return cls(pa.table({"id": table.column("item"), **fields, "text": pa.array(item_texts(text.item, table), pa.string())}))

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

    @cached_property
    def lookup(self) -> Lookup:
        return Lookup.of(self.ids)

    def write_ids(self, folder: str) -> str:
        """Write the lookup below `folder`; returns the file, whose name depends on the content."""
        return write_named(folder, "ids", self.lookup.table())

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
        cells = [(field, one_form(self.table.column(field.column).combine_chunks()).to_pylist()) for field in fields]
        rows = (
            [number for field, column in cells for number in field_ids(field.column, field.separator, column[row])]
            for row in range(self.table.num_rows)
        )
        return write_named(folder, "fields", pa.table({"fields": pa.array(rows, TOKENS_SCHEMA.field("fields").type)}))
