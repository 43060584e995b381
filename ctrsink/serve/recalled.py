"""Micro-batches of requests whose histories may be known: each is computed once, however many candidates stand behind it."""

from collections.abc import Sequence

import numpy as np
import torch

from ctrsink.families.hf import ExportedModel
from ctrsink.families.protocol import Kept
from ctrsink.sequences.collate import collate
from ctrsink.sequences.columns import Sequences
from ctrsink.serve.encoding import Encoded
from ctrsink.serve.history_cache import HistoryCache


def recalled(model: ExportedModel, requests: Sequence[Encoded], tokens: int, cache: HistoryCache | None) -> list[np.ndarray]:
    """Logits of each request's candidates, float64 [C].

    Args:
        model: one whose histories can be kept, see CTRModule.forgets.
        tokens: that are computed at once, at most; a sequence's candidates are not divided.
        cache: where histories stay until the user's next request; None: nowhere.
    """
    histories, of_request = _begun(model, requests, cache)
    begun = [(history.known, history.tokens) for history in histories]
    parts = [part for request in requests for part in map(request.sequences.__getitem__, range(len(request.sequences)))]
    of = [history for request, history in zip(requests, of_request, strict=True) for _ in range(len(request.sequences))]
    costs = np.array([int(part.lengths[0]) - histories[history].tokens for part, history in zip(parts, of, strict=True)])
    firsts = [of.index(history) for history in range(len(histories))]
    costs[firsts] += [history.tokens - history.known for history in histories]
    out: list[np.ndarray] = []
    for rows in _in_order(costs, tokens):
        own = [of[row] for row in rows]
        used = list(dict.fromkeys(own))
        every = np.arange(len(rows))
        batch = collate(Sequences.joined([parts[row] for row in rows]), every, every)
        with torch.inference_mode():
            logits, now = model.recall(batch, [histories[h] for h in used], [used.index(h) for h in own])
        for h, history in zip(used, now, strict=True):
            histories[h] = history
        out.append(logits.double().cpu().numpy())
    found = np.split(np.concatenate(out), np.cumsum([request.candidates for request in requests])[:-1])
    if cache is not None:  # only now: what failed is run again, and would be counted twice
        for known, of_all in begun:
            cache.counts.add(known, of_all)
    for request, logits, h in zip(requests, found, of_request, strict=True):
        if cache is not None and np.isfinite(logits).all():
            cache.put(request.user, histories[h])
    return found


def _begun(model: ExportedModel, requests: Sequence[Encoded], cache: HistoryCache | None) -> tuple[list[Kept], list[int]]:
    """The histories of the requests, each with what is known of it, and the number of each request's."""
    histories: list[Kept] = []
    latest: dict[str, int] = {}
    numbers: list[int] = []
    for request in requests:
        first = request.sequences[0]
        number = None if request.user is None else latest.get(request.user)
        if number is None or model.ctr.begun(first, histories[number]) is not histories[number]:
            kept = model.ctr.begun(first, None if cache is None else cache.get(request.user))
            number = len(histories)
            histories.append(kept)
            if request.user is not None:
                latest[request.user] = number
        numbers.append(number)
    return histories, numbers


def _in_order(costs: np.ndarray, budget: int) -> list[list[int]]:
    """Indices into `costs`, in their order, in groups of the budget at most; what costs more is a group of its own."""
    groups: list[list[int]] = []
    used = budget + 1
    for row, cost in enumerate(costs.tolist()):
        used += cost
        if used > budget:
            groups.append([])
            used = cost
        groups[-1].append(row)
    return groups
