"""A sample of what was asked and answered, as Parquet that prepare/served.py reads; who answers never waits for it."""

import hashlib
import json
import logging
import queue
import random
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from ctrsink import storage
from ctrsink.config.serve import RequestLogSpec
from ctrsink.dataset.arrow import to_parquet
from ctrsink.dataset.values import id_text, text
from ctrsink.errors import InputError, RunError
from ctrsink.prepare.served import EVENT_SCHEMA, EVENTS, HISTORY, ITEMS, SHOWN
from ctrsink.serve.metrics import Metrics
from ctrsink.serve.model import Model
from ctrsink.serve.requests import Item, Request

_MOST_ROWS = 200_000  # that wait to be written
log = logging.getLogger("ctrsink.serve")


@dataclass(frozen=True)
class _Entry:
    name: str
    request: Request
    scores: list[float]
    model: Model

    @property
    def rows(self) -> int:
        return len(self.request.history) + len(self.scores)


@dataclass
class _File:
    """What is collected for the next pair of files."""

    began: float = field(default_factory=time.monotonic)
    requests: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    items: dict[str, dict[str, str]] = field(default_factory=dict)


class RequestLog:
    """Takes requests into a bounded queue, and a thread of its own writes them; what has no room there is dropped and counted.

    Args:
        spec: with the folder `to`, in which `events` and `items` are.
        metrics: told how many were written and dropped.
    """

    def __init__(self, spec: RequestLogSpec, metrics: Metrics) -> None:
        assert spec.to is not None
        self._spec, self._to, self._metrics = spec, spec.to, metrics
        self._waiting: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._rows, self._lock = 0, threading.Lock()  # that wait
        self._writer = uuid.uuid4().hex[:8]
        self._number = 0
        self._thread = threading.Thread(target=self._work, name="ctrsink-log", daemon=True)
        self._thread.start()

    def take(self, name: Any, request: Request, scores: list[float], model: Model) -> None:
        """Write this request, if it is of the sample."""
        if not self._chosen(request.user):
            return
        entry = _Entry(_name(name), request, scores, model)
        with self._lock:
            room = self._rows + entry.rows <= _MOST_ROWS
            self._rows += entry.rows if room else 0
        if room:
            self._waiting.put(entry)
        else:
            self._metrics.logged.labels("dropped").inc()

    def close(self) -> None:
        """Write what is left."""
        self._waiting.put(None)
        self._thread.join()

    def _chosen(self, user: str | int | None) -> bool:
        """All requests of a user, or none: a user's sequence has no holes."""
        if user is None:
            return random.random() < self._spec.share
        return int.from_bytes(hashlib.blake2b(str(user).encode(), digest_size=8).digest()) < self._spec.share * 2**64

    def _work(self) -> None:
        file, ended = _File(), False
        while not ended:
            try:
                entry = self._waiting.get(timeout=max(0.01, file.began + self._spec.seconds - time.monotonic()))
                ended = entry is None
                if entry is not None:
                    self._add(file, entry)
            except queue.Empty:
                pass
            old = time.monotonic() - file.began >= self._spec.seconds
            if ended or old or len(file.events) >= self._spec.rows:
                self._write(file)
                file = _File()

    def _add(self, file: _File, entry: _Entry) -> None:
        with self._lock:
            self._rows -= entry.rows
        try:
            _add(file, entry)
        except Exception:  # nothing that is logged may end the thread
            self._metrics.logged.labels("dropped").inc()
            log.exception("a request could not be logged")

    def _write(self, file: _File) -> None:
        if not file.requests:
            return
        self._number += 1
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{self._writer}-{self._number:05d}.parquet"
        names = list(dict.fromkeys(name for fields in file.items.values() for name in fields))
        columns = {name: pa.array([fields.get(name, "") for fields in file.items.values()], pa.string()) for name in names}
        items = pa.table({"item": pa.array(file.items, pa.string()), **columns})
        try:
            storage.write_bytes(storage.join(self._to, ITEMS, name), to_parquet(items))
            # The events last: whose items are not there are of no use.
            events = pa.Table.from_pylist(file.events, EVENT_SCHEMA)
            storage.write_bytes(storage.join(self._to, EVENTS, name), to_parquet(events))
        except (InputError, RunError, OSError, pa.ArrowException) as error:
            self._metrics.logged.labels("dropped").inc(file.requests)
            log.warning("%d requests of the log are lost: %s", file.requests, error)
        else:
            self._metrics.logged.labels("written").inc(file.requests)


def _add(file: _File, entry: _Entry) -> None:
    request, fields = entry.request, entry.model.fields
    user = id_text(request.user) or f"of request {entry.name}"
    for behaviour in request.history:
        row = {"item": _item(file, behaviour.item, fields), "timestamp": behaviour.timestamp, "feedback": behaviour.feedback}
        row |= {"label": behaviour.label, "request": id_text(behaviour.request), "kind": HISTORY}
        file.events.append({"user": user, **row})
    for position, (item, score) in enumerate(zip(request.candidates, entry.scores, strict=True)):
        row = {"item": _item(file, item, fields), "timestamp": request.timestamp, "request": entry.name, "kind": SHOWN}
        file.events.append({"user": user, **row, "position": position, "score": score, "model": entry.model.version})
    file.requests += 1


def _item(file: _File, item: Item, fields: tuple[str, ...]) -> str:
    """The item's id; one without gets one of what the model reads of it."""
    told = {name: text(item.get(name)) or "" for name in fields if name not in ("id", "item")}
    try:
        name = id_text(item.get("id", item.get("item")))
    except ValueError:
        name = None
    if name is None:
        name = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()
    file.items[name] = told
    return name


def _name(given: Any) -> str:
    return given if isinstance(given, str) else json.dumps(given)
