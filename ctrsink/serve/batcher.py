"""Requests that wait for the model, and the one thread that runs it: batches by a budget of tokens, deadlines, back-pressure."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from ctrsink.config.serve import QueueSpec
from ctrsink.errors import InputError
from ctrsink.serve.encoding import Encoded
from ctrsink.serve.metrics import Metrics
from ctrsink.serve.refused import Refused, shed

log = logging.getLogger("ctrsink.serve")
Scores = list[float]


class Runs(Protocol):
    """A model as the batcher needs it."""

    @property
    def version(self) -> str: ...
    def run(self, batch: Sequence[Encoded]) -> list[Scores | InputError]: ...


@dataclass(eq=False)
class _Work:
    model: Runs
    encoded: Encoded
    since: float
    answer: asyncio.Future[Scores] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """All of it lives in the event loop but `model.run`, so nothing here is locked.

    Args:
        spec: what may wait.
        metrics: told what waits, and how long.
    """

    def __init__(self, spec: QueueSpec, metrics: Metrics) -> None:
        self._spec, self._metrics = spec, metrics
        self._thread = ThreadPoolExecutor(1, "ctrsink-model")
        self._waiting: dict[_Work, None] = {}  # in their order, and any of them can leave
        self._some = asyncio.Event()
        self._accepted = self._tokens = self._running = 0
        self._began = 0.0
        self._per_token = 0.0  # seconds, of late

    @property
    def accepted(self) -> int:
        """Requests that are not answered yet."""
        return self._accepted

    def foreseen(self) -> float:
        """Seconds until the model would begin on one more request, by how fast it was of late."""
        now = asyncio.get_running_loop().time()
        rest = max(0.0, self._running * self._per_token - (now - self._began)) if self._running else 0.0
        return rest + self._tokens * self._per_token

    @contextmanager
    def place(self, deadline: float) -> Iterator[None]:
        """A place for one request, from its acceptance to its answer; `deadline` is a time of the event loop.

        Raises:
            Refused: 503, there is none, or what waits already would take longer than until then.
        """
        foreseen = self.foreseen()
        if self._accepted >= self._spec.requests:
            raise shed(f"{self._accepted} requests wait already: try again later", "full", foreseen)
        if foreseen > deadline - asyncio.get_running_loop().time():
            raise shed(f"what waits already takes about {foreseen:.2g} s, longer than the deadline", "deadline", foreseen)
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    async def score(self, model: Runs, encoded: Encoded, deadline: float) -> Scores:
        """The model's scores of a request that has a place; whoever cancels this takes it out of the queue.

        Raises:
            Refused: 503, too many tokens wait, or the model had not begun on it at `deadline`; 500, the model cannot score it.
        """
        loop = asyncio.get_running_loop()
        if self._waiting and self._tokens + encoded.tokens > self._spec.tokens:
            raise shed(f"{self._tokens} tokens wait already: try again later", "tokens", self.foreseen())
        work = _Work(model, encoded, loop.time())
        self._waiting[work] = None
        self._add_tokens(encoded.tokens)
        self._some.set()
        timer = loop.call_at(deadline, self._expire, work)
        try:
            return await work.answer
        finally:
            timer.cancel()
            self._leave(work)

    async def work(self) -> None:
        """Run what waits, for ever."""
        while True:
            await self._some.wait()
            if batch := self._next():
                await self._run(batch)
            else:
                self._some.clear()

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _next(self) -> list[_Work]:
        """The first that waits and, in their order, those of the same model that fit beside it."""
        batch: list[_Work] = []
        tokens = 0
        for work in list(self._waiting):
            if work.answer.done():  # cancelled, and about to leave
                continue
            if batch and work.model is not batch[0].model:
                continue
            if batch and tokens + work.encoded.tokens > self._spec.batch_tokens:
                break
            batch.append(work)
            tokens += work.encoded.tokens
        for work in batch:
            self._leave(work)
        return batch

    async def _run(self, batch: list[_Work]) -> None:
        loop, model = asyncio.get_running_loop(), batch[0].model
        tokens, version = sum(work.encoded.tokens for work in batch), model.version
        self._running, self._began = tokens, loop.time()
        for work in batch:
            self._metrics.seconds.labels("queue", version).observe(self._began - work.since)
        try:
            found = await loop.run_in_executor(self._thread, model.run, [work.encoded for work in batch])
        except Exception as error:
            if len(batch) > 1:  # one of them may be at fault: the others are not to pay for it
                log.warning("a batch of %d requests failed (%s: %s): each alone now", len(batch), type(error).__name__, error)
                for work in batch:
                    await self._run([work])
                return
            log.exception("the model %s failed on a request", version)
            found = [InputError(f"the model failed ({type(error).__name__})")]
        finally:
            self._running = 0
        seconds = loop.time() - self._began
        self._per_token += (seconds / max(tokens, 1) - self._per_token) * (0.2 if self._per_token else 1.0)
        self._metrics.batch_tokens.labels(version).observe(tokens)
        self._metrics.batch_requests.labels(version).observe(len(batch))
        for work, scores in zip(batch, found, strict=True):
            self._metrics.seconds.labels("model", version).observe(seconds)
            if work.answer.done():
                continue  # its client went while the model ran
            if isinstance(scores, InputError):
                work.answer.set_exception(Refused(500, str(scores)))
            else:
                work.answer.set_result(scores)

    def _expire(self, work: _Work) -> None:
        if work in self._waiting:
            self._leave(work)
            if not work.answer.done():
                work.answer.set_exception(shed("the deadline passed before the model began", "deadline", self.foreseen()))

    def _leave(self, work: _Work) -> None:
        if work in self._waiting:
            del self._waiting[work]
            self._add_tokens(-work.encoded.tokens)

    def _count(self, change: int) -> None:
        self._accepted += change
        self._metrics.waiting.set(self._accepted)

    def _add_tokens(self, change: int) -> None:
        self._tokens += change
        self._metrics.waiting_tokens.set(self._tokens)
