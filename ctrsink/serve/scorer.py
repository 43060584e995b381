"""The scorer: requests to probabilities, through the same text, tokens, sequences and batches as in training."""

import json
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ctrsink import storage, strict_json
from ctrsink.config.data import TextSpec
from ctrsink.dataset.events import Events
from ctrsink.dataset.layout import Layout
from ctrsink.dataset.shard import with_told
from ctrsink.errors import InputError
from ctrsink.families.facts import Wording
from ctrsink.families.registry import family_of
from ctrsink.features.ragged import Ragged
from ctrsink.prepare.render import feedback_ids, feedback_minima, feedback_table, item_texts, template_fields
from ctrsink.prepare.tokenize import encode_items, encode_own
from ctrsink.request_lines import OnBadRequest, RequestLine, read_lines
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.collate import collate
from ctrsink.sequences.columns import Sequences
from ctrsink.sequences.windows import Cuts
from ctrsink.serve.load import Loaded, load_model
from ctrsink.serve.requests import Request, item_table, parse_request
from ctrsink.serve.told import check, histories_of

_NO_TOKENS = np.empty(0, np.int64)
CANDIDATES = 128  # behind one computation of the history
log = logging.getLogger("ctrsink.serve")


class Scorer:
    """Click probabilities from an exported model.

    Args:
        loaded: the model and what belongs to it.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.model, self.tokenizer, self.encoder = loaded.model, loaded.tokenizer, loaded.encoder
        self.knowledge = loaded.knowledge
        config = self.model.config
        self.text = TextSpec.model_validate(config.text)
        self.layout = Layout.load(config.layout).serving()
        self.family = family_of(self.layout.family)
        # Vectors of items are those of their texts.
        self._needs_text = self.family.reads_text or self.encoder is not None
        names = list(template_fields(self.text.item)) if self._needs_text else []
        if self.knowledge is not None:
            names += [*(field.column for field in self.knowledge.fields), "id"]
            names += [column.name for column in self.knowledge.columns if column.of == "item"]
        self.fields = list(dict.fromkeys(names))
        self.prefix = np.array(config.prefix_tokens, np.int64)

    @classmethod
    def load(cls, folder: str, device: str = "cpu", base: str | None = None) -> "Scorer":
        """The scorer of the model that `ctrsink export` wrote to `folder`, local or s3://; `base`: see load_model.

        Raises:
            InputError: there is no such model, or it is damaged, or an adapter without its base.
        """
        return cls(load_model(folder, device, base))

    def score(self, request: dict[str, Any]) -> list[float]:
        """The probability of a click for each of the request's candidates, in their order; see Request for its keys.

        Raises:
            InputError: the request is not of that form, or an item lacks a field of the model's template.
        """
        return self.probabilities(self.parse(request, "request"), "request")

    def parse(self, tree: Any, where: str) -> Request:
        """See parse_request and told.check."""
        request = parse_request(tree, self.fields, where)
        if self.knowledge is not None:
            check(request, self.knowledge, self.layout.base, where)
        return request

    def probabilities(self, request: Request, where: str) -> list[float]:
        """As `score`, of a parsed request; errors name `where`, also where the model gives something that is no probability."""
        try:
            sequences = self._sequences(request)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        out: list[float] = []
        for sequence in sequences:
            with torch.inference_mode():
                out += self.model(_batch(sequence).to(self.model.device)).double().sigmoid().tolist()
        dead = next((i for i, probability in enumerate(out) if not math.isfinite(probability)), None)
        if dead is not None:
            raise InputError(
                f"{where}: the model's probability of candidates.{dead} is not finite: its weights have overflowed, export "
                "another checkpoint"
            )
        return out

    def nearest(self, request: dict[str, Any], candidate: int, count: int = 3) -> list[tuple[int, float]]:
        """The behaviours whose sinks a candidate attends to most: numbers in the request's history by time, and shares.

        A share is of the attention that the candidate's last token pays to all sinks, over all layers and heads.

        Raises:
            InputError: the request cannot be scored.
        """
        if self.layout.retrieve is not None:
            raise InputError("the model retrieves behaviours (data.retrieve): which of them a sink is of is not told")
        parsed = self.parse(request, "request")
        (sequence,) = self._sequences(parsed.model_copy(update={"candidates": (parsed.candidates[candidate],)}))
        paid = self.model.ctr.paid(_batch(sequence).to(self.model.device), self.model.objective)
        if paid is None:
            return []
        shares, slots = (paid / paid.sum().clamp(min=1e-12)).topk(min(count, len(paid)))
        first = len(parsed.history) - len(paid)
        return [(first + slot, value) for slot, value in zip(slots.tolist(), shares.tolist(), strict=True)]

    def _sequences(self, request: Request) -> list[Sequences]:
        """The history and candidates behind it, as many as may share one."""
        count = len(request.history)
        items = [*(b.item for b in request.history), *request.candidates]
        fields = item_table(items, self.fields)
        item_text = item_texts(self.text.item, fields) if self._needs_text else []
        texts = self._item_tokens(fields, item_text) if self.family.reads_text else Ragged.of([_NO_TOKENS] * len(items))
        vectors = self.encoder and self.encoder.encode(item_text)
        given = np.array([np.nan if b.feedback is None else b.feedback for b in request.history], np.float32)
        rendered = feedback_table(self.text, (), feedback_minima(self.text, given))
        feedback_rows = feedback_ids(self.text, rendered, given)
        feedbacks = Ragged.of([np.array(ids, np.int64) for ids in encode_own(self.tokenizer, list(rendered))])
        moments = [*(b.timestamp for b in request.history), *[request.timestamp] * len(request.candidates)]
        timestamps = np.floor(moments).astype(np.int64)
        candidates = len(request.candidates)
        events = Events(
            texts=np.arange(count + candidates),
            feedbacks=np.append(feedback_rows.astype(np.int64), np.zeros(candidates, np.int64)),
            timestamps=timestamps,
            labels=np.zeros(count + candidates, np.int8),
            known=np.append(np.arange(count), np.full(candidates, count)),
            tokens=texts,
            vectors=vectors,
        )
        histories = histories_of(request, timestamps, self.knowledge, vectors) if self.knowledge else None
        events = with_told(events, self.layout, histories, self._known_feedbacks(rendered)[events.feedbacks])
        # What depends on the candidate's item is no history that candidates share.
        together = 1 if self.layout.depends_on_target else CANDIDATES
        chosen = np.split(np.arange(count, count + candidates), range(together, candidates, together))
        cuts = (Cuts([events], np.array([1]), np.array([0]), Ragged.of([rows])) for rows in chosen)
        wording = Wording(feedbacks, self.prefix)
        return [self.family.encode(cut, self.layout, wording) for cut in cuts]

    def _known_feedbacks(self, rendered: tuple[str, ...]) -> np.ndarray:
        """Of the texts of a request's feedback the numbers that the data set has for them; 0, no feedback, for a new one."""
        numbers: dict[str, int] = {text: number for number, text in enumerate(self.model.config.feedback_texts or ())}
        return np.array([numbers.get(text, 0) for text in rendered], np.int64)

    def _item_tokens(self, fields: pa.Table, texts: list[str]) -> Ragged:
        rendered = encode_items(self.tokenizer, self.text.item, fields, texts)
        tokens = [np.array(ids[: self.text.max_item_tokens], np.int64) for ids in rendered]
        empty = next((i for i, ids in enumerate(tokens) if not len(ids)), None)
        if empty is not None:
            item = {name: fields.column(name)[empty].as_py() for name in self.fields}
            raise InputError(f"the text of the item {json.dumps(item, ensure_ascii=False)} is empty: fill in its fields")
        return Ragged.of(tokens)


def _batch(sequence: Sequences) -> Batch:
    return collate(sequence, np.array([0]), np.array([0]))


def score_file(folder: str, input_path: str, output: str | None = None, on_bad_request: OnBadRequest = "fail") -> dict[str, Any]:
    """Score a file of requests, one JSON object a line, with the model in `folder`; see score_lines."""
    return score_lines(folder, read_lines(input_path, on_bad_request), output, on_bad_request)


def score_lines(
    folder: str,
    lines: list[RequestLine],
    output: str | None = None,
    on_bad_request: OnBadRequest = "fail",
    base: str | None = None,
) -> dict[str, Any]:
    """Score the requests of a file with the model in `folder`; `base`: see load_model.

    Writes one line per request, `{"probabilities": [...]}` and the request's `id` if it has one, to `output` (a file, local or
    s3://) or to stdout; all at the end, so that bad input leaves nothing behind. A request that is skipped has a line too, with
    an `error`, so that lines stay those of the input.

    Returns:
        Counts of `requests` and `candidates` scored, and how many were `skipped` where that was allowed.

    Raises:
        InputError: a request cannot be scored; the message names its line. Or none of them can.
    """
    scorer = Scorer.load(folder, base=base)
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
