"""One model as a service holds it: its scorer, its version, and the request that warms it up."""

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ctrsink.config.serve import ServeSpec
from ctrsink.errors import InputError, first_line
from ctrsink.serve.encoding import Encoded
from ctrsink.serve.load import Loaded, load_folder, local_copy
from ctrsink.serve.requests import Request
from ctrsink.serve.scorer import Scorer

WHERE = "request"
_WARM = ((0, 1), (None, 1), (None, 100), (None, 100))
"""Behaviours, None for as many as the model takes, and candidates."""
log = logging.getLogger("ctrsink.serve")


@dataclass(frozen=True, eq=False)
class Model:
    """A model that has scored already."""

    folder: str
    version: str
    """Name of the folder, `@`, and the first digits of the sha256 over all its files."""
    scorer: Scorer

    @classmethod
    def load(cls, folder: str, spec: ServeSpec) -> "Model":
        """Load the model in `folder`, local or s3://, and warm it up; `spec.model` is not looked at.

        Raises:
            InputError: there is no such model, or it is damaged, or what it gives is no probability.
        """
        start = time.monotonic()
        _require_device(spec.device)
        with local_copy(folder) as copy:
            version = f"{folder.rstrip('/').rpartition('/')[2] or 'model'}@{_digest(copy)[:12]}"
            model = cls(folder, version, cls._scorer(load_folder(folder, copy, spec.device, spec.base), spec))
        loaded = time.monotonic()
        model._warm_up()
        warm = time.monotonic()
        log.info("model %s loaded from %s in %.1f s, warmed up in %.1f s", version, folder, loaded - start, warm - loaded)
        return model

    def parse(self, tree: Any) -> Request:
        """See Scorer.parse."""
        return self.scorer.parse(tree, WHERE)

    def encode(self, request: Request) -> Encoded:
        """See Scorer.encode."""
        return self.scorer.encode(request, WHERE)

    def run(self, batch: Sequence[Encoded]) -> list[list[float] | InputError]:
        """See Scorer.run."""
        return self.scorer.run(batch)

    def counts(self) -> dict[str, dict[str, float]]:
        """What the scorer counts, by the metric's name."""
        kept = self.scorer.histories
        if kept is None:
            return {}
        of = kept.counts
        return {
            "histories_total": {"hit": of.hit, "extended": of.extended, "missed": of.missed},
            "history_tokens_total": {"known": of.known_tokens, "computed": of.computed_tokens},
            "kept_bytes": {"histories": kept.nbytes},
        }

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """What it needs to know of an item."""
        return tuple(self.scorer.fields)

    @staticmethod
    def _scorer(loaded: Loaded, spec: ServeSpec) -> Scorer:
        cache = {"items": spec.cache.items, "history_bytes": spec.cache.history_bytes, "sinks_only": spec.cache.sinks_only}
        scorer = Scorer(loaded, tokens=spec.queue.batch_tokens, **cache)
        if scorer.caches is not None:
            log.info("no history is kept between requests: %s", scorer.caches)
        return scorer

    def _warm_up(self) -> None:
        history = self.scorer.layout.history
        for behaviours, candidates in _WARM:
            tree = self.example(history if behaviours is None else behaviours, candidates)
            (scores,) = self.run([self.encode(self.parse(tree))])
            if isinstance(scores, InputError):
                raise InputError(f"the model {self.folder} cannot be used: {scores}")

    def example(self, behaviours: int, candidates: int) -> dict[str, Any]:
        """A request that the model takes, with nothing in it that means anything."""
        item: dict[str, Any] = dict.fromkeys(self.scorer.fields, "1")
        if self.scorer.layout.base is not None:
            item[self.scorer.layout.base] = 0.0
        behaviour = {"item": item, "timestamp": 0, "label": None, "feedback": None}
        return {"history": [behaviour] * behaviours, "candidates": [item] * candidates, "timestamp": 1}


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {device!r} cannot be used ({first_line(error)}): give cpu, or cuda where there is a GPU"
        ) from None


def _digest(folder: Path) -> str:
    """Over names and content of all files below it."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            whole.update(f"{path.relative_to(folder)}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
