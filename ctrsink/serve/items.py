"""Texts of items and of feedback as tokens and vectors, each computed once while it is remembered."""

import json
from collections.abc import Sequence
from threading import Lock

import numpy as np
from cachetools import LRUCache

from ctrsink.config.data import TextSpec
from ctrsink.dataset.values import text
from ctrsink.errors import InputError
from ctrsink.features.ragged import Ragged
from ctrsink.prepare.render import MAX_FEEDBACK_TEXTS, item_texts, template_fields
from ctrsink.prepare.tokenize import encode_items, encode_own
from ctrsink.serve.load import Loaded
from ctrsink.serve.requests import Item, item_table

_Known = tuple[np.ndarray, np.ndarray | None]
"""Tokens, int64 [n], and vector, float16 [width]."""


class ItemTexts:
    """Tokens and vectors by what a template shows of an item: an item whose fields change is another one. For any thread.

    Args:
        loaded: the model and what belongs to it.
        reads_text: whether the model is given tokens.
        capacity: items that are remembered, least recently used out first.
    """

    def __init__(self, loaded: Loaded, reads_text: bool, capacity: int) -> None:
        self._tokenizer, self._encoder, self._reads_text = loaded.tokenizer, loaded.encoder, reads_text
        self._text = TextSpec.model_validate(loaded.model.config.text)
        # Vectors of items are those of their texts.
        self.fields = template_fields(self._text.item) if reads_text or loaded.encoder is not None else []
        self._known: LRUCache[tuple[str, ...], _Known] = LRUCache(max(1, capacity))
        self._feedbacks: LRUCache[str, np.ndarray] = LRUCache(MAX_FEEDBACK_TEXTS)
        # A tokenizer is switched between texts of the log and those of the configuration.
        self._lock = Lock()

    def of(self, items: Sequence[Item]) -> tuple[Ragged, np.ndarray | None]:
        """Tokens of each, N rows, and vectors, float16 [N, width], where the model reads them.

        Raises:
            InputError: the text of an item is empty.
        """
        keys = [tuple(text(item[name]) or "" for name in self.fields) for item in items]
        with self._lock:
            found = {key: self._known[key] for key in keys if key in self._known}
            new = {key: item for key, item in zip(keys, items, strict=True) if key not in found}
            for key, known in zip(new, self._encoded(list(new.values())), strict=True):
                found[key] = self._known[key] = known
        vectors = [found[key][1] for key in keys] if self._encoder is not None else None
        return Ragged.of([found[key][0] for key in keys]), None if vectors is None else np.stack(vectors)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def feedbacks(self, rendered: Sequence[str]) -> Ragged:
        """Tokens of texts of feedback, a row each."""
        with self._lock:
            found = {one: self._feedbacks[one] for one in rendered if one in self._feedbacks}
            new = [one for one in rendered if one not in found]
            for one, ids in zip(new, encode_own(self._tokenizer, new), strict=True):
                found[one] = self._feedbacks[one] = np.array(ids, np.int64)
        return Ragged.of([found[one] for one in rendered])

    def _encoded(self, items: list[Item]) -> list[_Known]:
        if not items:
            return []
        table = item_table(items, self.fields)
        texts = item_texts(self._text.item, table) if self.fields or self._reads_text else []
        tokens = [np.empty(0, np.int64)] * len(items)
        if self._reads_text:
            rendered = encode_items(self._tokenizer, self._text.item, table, texts)
            tokens = [np.array(ids[: self._text.max_item_tokens], np.int64) for ids in rendered]
            if (empty := next((i for i, ids in enumerate(tokens) if not len(ids)), None)) is not None:
                item = {name: text(items[empty][name]) or "" for name in self.fields}
                raise InputError(f"the text of the item {json.dumps(item, ensure_ascii=False)} is empty: fill in its fields")
        vectors = [None] * len(items) if self._encoder is None else [vector.copy() for vector in self._encoder.encode(texts)]
        return list(zip(tokens, vectors, strict=True))
