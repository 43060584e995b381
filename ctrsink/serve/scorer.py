"""The scorer: requests to probabilities, through the same text, tokens, sequences and batches as in training."""

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ctrsink import storage, strict_json
from ctrsink.config.data import TextSpec
from ctrsink.data.collate import collate
from ctrsink.data.encoder import Encoder
from ctrsink.data.examples import Chronology, Layout, Ragged, Sequence, build_sequence
from ctrsink.data.render import feedback_ids, feedback_minima, feedback_table, item_texts
from ctrsink.data.request_lines import OnBadRequest, RequestLine, read_lines
from ctrsink.data.tokenize import encode
from ctrsink.errors import InputError
from ctrsink.model.hf import CTRSinkModel
from ctrsink.serve.load import load_model
from ctrsink.serve.requests import Request, item_table, parse_request, template_fields

CANDIDATES = 128  # behind one computation of the history
log = logging.getLogger("ctrsink.serve")


class Scorer:
    """Click probabilities from an exported model.

    Args:
        model: in evaluation mode.
        tokenizer: the one it was trained with.
        encoder: that of its data set, where sequences depend on items' vectors.
    """

    def __init__(self, model: CTRSinkModel, tokenizer: PreTrainedTokenizerBase, encoder: Encoder | None = None) -> None:
        config = model.config
        self.model, self.tokenizer, self.encoder = model, tokenizer, encoder
        self.text = TextSpec.model_validate(config.text)
        self.fields = template_fields(self.text.item)
        self.prefix = np.array(config.prefix_tokens, np.int64)
        layout = Layout(**config.layout | {"signals": tuple(config.layout["signals"])})
        # A per_user sequence shows the last of its targets everything up to `history` before the first.
        more = layout.targets - 1 if layout.examples == "per_user" else 0
        self.layout = dataclasses.replace(layout, history=layout.history + more)

    @classmethod
    def load(cls, folder: str, device: str = "cpu") -> "Scorer":
        """The scorer of the model that `ctrsink export` wrote to `folder`, local or s3://.

        Raises:
            InputError: there is no such model, or it is damaged.
        """
        return cls(*load_model(folder, device))

    def score(self, request: dict[str, Any]) -> list[float]:
        """The probability of a click for each of the request's candidates, in their order; see Request for its keys.

        Raises:
            InputError: the request is not of that form, or an item lacks a field of the model's template.
        """
        return self.probabilities(self.parse(request, "request"), "request")

    def parse(self, tree: Any, where: str) -> Request:
        """See parse_request."""
        return parse_request(tree, self.fields, where)

    def probabilities(self, request: Request, where: str) -> list[float]:
        """As `score`, of a parsed request; errors name `where`."""
        try:
            sequences = self._sequences(request)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        out: list[float] = []
        for sequence in sequences:
            with torch.inference_mode():
                logits = self.model(collate([sequence], [0]).to(self.model.device))
            out += logits[0].double().sigmoid().tolist()
        return out

    def _sequences(self, request: Request) -> list[Sequence]:
        """The history and candidates behind it, as many as may share one."""
        count = len(request.history)
        items = [*(b.item for b in request.history), *request.candidates]
        texts = self._item_tokens(items)
        vectors = self.encoder and self.encoder.encode(self._item_texts(items))
        given = np.array([np.nan if b.feedback is None else b.feedback for b in request.history], np.float32)
        rendered = feedback_table(self.text, (), feedback_minima(self.text, given))
        feedback_rows = feedback_ids(self.text, rendered, given)
        feedbacks = Ragged.of([np.array(ids, np.int64) for ids in encode(self.tokenizer, list(rendered))])
        moments = [*(b.timestamp for b in request.history), *[request.timestamp] * len(request.candidates)]
        timestamps = np.floor(moments).astype(np.int64)
        candidates = len(request.candidates)
        chronology = Chronology(
            texts=np.arange(count + candidates),
            feedbacks=np.append(feedback_rows.astype(np.int64), np.zeros(candidates, np.int64)),
            timestamps=timestamps,
            labels=np.zeros(count + candidates, np.int8),
            known=np.append(np.arange(count), np.full(candidates, count)),
        )
        # What depends on the candidate's vector is no history that candidates share.
        together = 1 if self.layout.needs_vectors else CANDIDATES
        return [
            build_sequence(chronology, chosen, self.layout, texts, feedbacks, self.prefix, vectors)
            for chosen in np.split(np.arange(count, count + candidates), range(together, candidates, together))
        ]

    def _item_texts(self, items: list[dict[str, Any]]) -> list[str]:
        return item_texts(self.text.item, item_table(items, self.fields))

    def _item_tokens(self, items: list[dict[str, Any]]) -> Ragged:
        rendered = encode(self.tokenizer, self._item_texts(items))
        tokens = [np.array(ids[: self.text.max_item_tokens], np.int64) for ids in rendered]
        empty = next((i for i, ids in enumerate(tokens) if not len(ids)), None)
        if empty is not None:
            raise InputError(f"the text of the item {json.dumps(items[empty], ensure_ascii=False)} is empty: fill in its fields")
        return Ragged.of(tokens)


def score_file(folder: str, input_path: str, output: str | None = None, on_bad_request: OnBadRequest = "fail") -> dict[str, Any]:
    """Score a file of requests, one JSON object a line, with the model in `folder`; see score_lines."""
    return score_lines(folder, read_lines(input_path, on_bad_request), output, on_bad_request)


def score_lines(
    folder: str, lines: list[RequestLine], output: str | None = None, on_bad_request: OnBadRequest = "fail"
) -> dict[str, Any]:
    """Score the requests of a file with the model in `folder`.

    Writes one line per request, `{"probabilities": [...]}` and the request's `id` if it has one, to `output` (a file, local or
    s3://) or to stdout; all at the end, so that bad input leaves nothing behind. A request that is skipped has a line too, with
    an `error`, so that lines stay those of the input.

    Returns:
        Counts of `requests` and `candidates` scored, and how many were `skipped` where that was allowed.

    Raises:
        InputError: a request cannot be scored; the message names its line. Or none of them can.
    """
    scorer = Scorer.load(folder)
    problems: dict[int, str] = {number: line.problem for number, line in enumerate(lines) if line.problem is not None}
    requests: dict[int, Request] = {}
    rows: dict[int, dict[str, Any]] = {}

    @contextmanager
    def judged(number: int) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            if on_bad_request == "fail":
                raise
            problems[number] = str(error)

    # Every line is checked before the first is scored: a mistake in the last one shows at once.
    for number, line in enumerate(lines):
        if number not in problems:
            with judged(number):
                requests[number] = scorer.parse(line.tree, line.where)
    for number, request in requests.items():
        with judged(number):
            rows[number] = {"probabilities": scorer.probabilities(request, lines[number].where)}
    if problems:
        first = problems[min(problems)]
        if not rows:
            raise InputError(f"none of {len(lines)} requests can be scored; the first: {first}")
        log.warning("skipped %d of %d requests; the first: %s", len(problems), len(lines), first)
    found = [
        _named(line.tree) | (rows[number] if number in rows else {"error": problems[number]}) for number, line in enumerate(lines)
    ]
    content = "".join(strict_json.dumps(row) + "\n" for row in found)
    if output is None:
        sys.stdout.write(content)
    else:
        storage.write_bytes(output, content.encode())
    counts = {"requests": len(rows), "candidates": sum(len(requests[number].candidates) for number in rows)}
    return counts | ({"skipped": len(problems)} if on_bad_request == "skip" else {})


def _named(tree: Any) -> dict[str, Any]:
    """The request's id, to be returned with what it got."""
    return {"id": tree["id"]} if isinstance(tree, dict) and tree.get("id") is not None else {}
