"""The item table of a data set and the tokens of every item, each tokenised once."""

import logging
from dataclasses import dataclass

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ctrsink import storage
from ctrsink.config.data import TextSpec
from ctrsink.data import tokenize
from ctrsink.data.arrow import pc, to_ipc
from ctrsink.data.manifest import TOKENS_SCHEMA
from ctrsink.data.render import item_texts
from ctrsink.errors import InputError

log = logging.getLogger("ctrsink.data")
_NAMED = 5  # items, in a message
_CHUNK = 50_000  # items tokenised at a time: their ids are Python lists for a moment


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

    def write_ids(self, folder: str) -> str:
        """Write the ids below `folder`; returns the file, whose name depends on the content."""
        return _write(folder, "ids", pa.table({"item": self.ids}))

    def write_tokens(self, folder: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> str:
        """Write the token ids of all items, each cut to `limit`; returns the file, whose name depends on the content.

        Raises:
            InputError: an item has none.
        """
        chunks, texts, kind = [], self.texts, TOKENS_SCHEMA.field("tokens").type
        for start in range(0, len(texts), _CHUNK):
            ids = [tokens[:limit] for tokens in tokenize.encode(tokenizer, texts[start : start + _CHUNK])]
            for number, tokens in enumerate(ids, start):
                if not tokens:
                    raise InputError(
                        f"the text of item {self.ids[number].as_py()!r} is empty: fill in its fields in the item table, "
                        "or add text to text.item"
                    )
            chunks.append(pa.array(ids, kind))
        return _write(folder, "tokens", pa.table({"tokens": pa.chunked_array(chunks, kind)}))


def _write(folder: str, name: str, table: pa.Table) -> str:
    content = to_ipc(table)
    path = storage.join(folder, f"{name}-{storage.sha256(content)[:16]}.arrow")
    storage.write_bytes(path, content)
    return path
