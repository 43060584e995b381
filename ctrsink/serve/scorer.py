"""The scorer: requests to probabilities, through the same text, tokens, sequences and batches as in training."""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch

from ctrsink.dataset.values import id_text
from ctrsink.errors import InputError
from ctrsink.sequences.batch import Batch
from ctrsink.sequences.collate import collate
from ctrsink.sequences.columns import TARGETS, Sequences, spans
from ctrsink.serve.encoding import Encoded, RequestEncoder
from ctrsink.serve.history_cache import HistoryCache
from ctrsink.serve.load import Loaded, load_model
from ctrsink.serve.recalled import recalled
from ctrsink.serve.requests import Request, parse_request
from ctrsink.serve.told import check, check_id
from ctrsink.stream.budget import fill

TOKENS, ITEMS = 16384, 100_000


class Scorer:
    """Click probabilities from an exported model.

    `parse` and `encode` may be called from any thread, while one calls `run`.

    Args:
        loaded: the model and what belongs to it.
        tokens: of a micro-batch, at most; a sequence that is longer is one of its own.
        items: whose tokens and vectors are kept, at most.
        history_bytes: of what is kept of users' histories between their requests, at most; 0: nothing is.
        sinks_only: keep only what candidates read of a history: several times less, but a history that grew is computed anew.

    Raises:
        InputError: `sinks_only`, and candidates read all of a history, or none is kept.
    """

    def __init__(
        self, loaded: Loaded, *, tokens: int = TOKENS, items: int = ITEMS, history_bytes: int = 0, sinks_only: bool = False
    ) -> None:
        self.model, self.tokens = loaded.model, tokens
        self.encoding = RequestEncoder(loaded, items)
        self.layout, self.fields, self.knowledge = self.encoding.layout, self.encoding.fields, loaded.knowledge
        self._forgets = self.model.ctr.forgets(self.layout)
        self.caches = self._forgets or (None if history_bytes else "no memory is given for histories (history_bytes)")
        """Why no history is kept between requests; None where they are."""
        if sinks_only and (self.caches or not self.model.ctr.narrows(self.model.objective)):
            reason = self.caches or "its candidates read texts of the history, too (readout.over is not sinks)"
            raise InputError(f"sinks_only: the model is not scored from what is kept of sinks: {reason}")
        self.histories = None if self.caches else HistoryCache(history_bytes, sinks_only)
        """What is kept of users' histories between their requests, where something is."""

    @classmethod
    def load(
        cls,
        folder: str,
        device: str = "cpu",
        base: str | None = None,
        *,
        tokens: int = TOKENS,
        items: int = ITEMS,
        history_bytes: int = 0,
        sinks_only: bool = False,
    ) -> "Scorer":
        """The scorer of the model that `ctrsink export` wrote to `folder`, local or s3://.

        `base`: see load_model; the others: see the class.

        Raises:
            InputError: there is no such model, or it is damaged, or an adapter without its base.
        """
        loaded = load_model(folder, device, base)
        return cls(loaded, tokens=tokens, items=items, history_bytes=history_bytes, sinks_only=sinks_only)

    def score(self, request: dict[str, Any]) -> list[float]:
        """The probability of a click for each of the request's candidates, in their order; see Request for its keys.

        Raises:
            InputError: the request is not of that form, or an item lacks a field of the model's template.
        """
        return self.probabilities(self.parse(request, "request"), "request")

    def parse(self, tree: Any, where: str) -> Request:
        """See parse_request and told.check."""
        request = parse_request(tree, self.fields, where)
        check_id(request.user, f"{where}: user")
        if self.knowledge is not None:
            check(request, self.knowledge, self.layout.base, where)
        return request

    def encode(self, request: Request, where: str) -> Encoded:
        """What the model reads of a parsed request; by numpy, without the model.

        Raises:
            InputError: an item has no text; the message names `where`.
        """
        try:
            sequences = self.encoding.sequences(request)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        return Encoded(sequences, where, id_text(request.user))

    def run(self, requests: Sequence[Encoded]) -> list[list[float] | InputError]:
        """The probabilities of each request's candidates, in micro-batches of `tokens` tokens that requests share.

        A request alone, whose candidates fit behind one history, gets the same bits whenever it is scored; others, and with kept
        histories all, differ from that by rounding. In the place of a request that the model cannot take, or whose probabilities
        are not finite, stands an InputError, which names it.
        """
        try:
            return self._run(requests)
        except InputError as error:
            if len(requests) > 1:
                return [found for request in requests for found in self.run([request])]
            return [InputError(f"{request.where}: {error}") for request in requests]

    def _run(self, requests: Sequence[Encoded]) -> list[list[float] | InputError]:
        recall = [self._recalls(request) for request in requests]
        found = {True: iter(self._recalled(list(compress(requests, recall))))}
        found[False] = iter(self._whole([request for request, own in zip(requests, recall, strict=True) if not own]))
        return [_judged(next(found[own]), request.where) for request, own in zip(requests, recall, strict=True)]

    def _recalls(self, request: Encoded) -> bool:
        """Whether it is worth computing the history apart from candidates: it is kept, or all of them do not fit behind it."""
        return self._forgets is None and (self.histories is not None or len(request.sequences) > 1)

    def _recalled(self, requests: list[Encoded]) -> list[np.ndarray]:
        return recalled(self.model, requests, self.tokens, self.histories) if requests else []

    def _whole(self, requests: list[Encoded]) -> list[np.ndarray]:
        """Logits of each request, float64 [C]."""
        if not requests:
            return []
        sequences = Sequences.joined([request.sequences for request in requests])
        out = np.empty(sequences.bounds[TARGETS][-1])
        for rows in fill(sequences.lengths, self.tokens, sequences.padded):
            rows.sort()
            with torch.inference_mode():
                found = self.model(_batch(sequences, rows).to(self.model.device)).double().cpu().numpy()
            out[np.concatenate([np.arange(a, b) for a, b in spans(sequences.bounds[TARGETS], rows)])] = found
        return np.split(out, np.cumsum([request.candidates for request in requests])[:-1])

    def probabilities(self, request: Request, where: str) -> list[float]:
        """As `score`, of a parsed request; errors name `where`, also where the model gives something that is no probability."""
        (found,) = self.run([self.encode(request, where)])
        if isinstance(found, InputError):
            raise found
        return found

    def nearest(self, request: dict[str, Any], candidate: int, count: int = 3) -> list[tuple[int, float]]:
        """The behaviours whose sinks a candidate attends to most: numbers in the request's history by time, and shares.

        A share is of the attention that the candidate's last token pays to all sinks, over all layers and heads.

        Raises:
            InputError: the request cannot be scored.
        """
        if self.layout.retrieve is not None:
            raise InputError("the model retrieves behaviours (data.retrieve): which of them a sink is of is not told")
        parsed = self.parse(request, "request")
        alone = self.encoding.sequences(parsed.model_copy(update={"candidates": (parsed.candidates[candidate],)}))
        paid = self.model.paid(_batch(alone, np.array([0])).to(self.model.device))
        if paid is None:
            return []
        shares, slots = (paid / paid.sum().clamp(min=1e-12)).topk(min(count, len(paid)))
        first = len(parsed.history) - len(paid)
        return [(first + slot, value) for slot, value in zip(slots.tolist(), shares.tolist(), strict=True)]


def _batch(sequences: Sequences, rows: np.ndarray) -> Batch:
    return collate(sequences, rows, np.zeros_like(rows))


def _judged(logits: np.ndarray, where: str) -> list[float] | InputError:
    probabilities = torch.from_numpy(logits).sigmoid().numpy()
    dead = np.flatnonzero(~np.isfinite(probabilities))
    if len(dead):
        return InputError(
            f"{where}: the model's probability of candidates.{dead[0]} is not finite: its weights have overflowed, export "
            "another checkpoint"
        )
    return probabilities.tolist()
