"""A service without its protocol: bytes of a request become the scores of one model, or a reason why not."""

import asyncio
import math
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from ctrsink.config.serve import ServeSpec
from ctrsink.errors import InputError
from ctrsink.serve.batcher import Batcher
from ctrsink.serve.encoding import Encoded
from ctrsink.serve.limits import Reader, parse_json
from ctrsink.serve.metrics import Metrics
from ctrsink.serve.model import Model
from ctrsink.serve.models import Models
from ctrsink.serve.refused import Refused, shed
from ctrsink.serve.request_log import RequestLog
from ctrsink.serve.requests import Request

_LONGEST_MS = 3_600_000.0


@dataclass(frozen=True)
class Received:
    """A request's body, and until when it is of use; times are those of the event loop."""

    body: bytes
    at: float
    deadline: float


class Service:
    """Everything behind the routes; it lives in one event loop.

    Args:
        spec: see ServeSpec.
    """

    def __init__(self, spec: ServeSpec) -> None:
        self.spec, self.metrics = spec, Metrics()
        self.models = Models(spec, self.metrics, partial(Model.load, spec=spec))
        self.draining = False
        self._batcher = Batcher(spec.queue, self.metrics)
        self._reader = Reader(spec.limits)
        self._encoders = ThreadPoolExecutor(spec.queue.encoders, "ctrsink-encode")
        self._log = RequestLog(spec.log, self.metrics) if spec.log.to else None
        self._tasks: list[asyncio.Task[None]] = []
        self.metrics.watch(self._counted)

    async def start(self) -> None:
        """Load and warm up the model, then take requests.

        Raises:
            InputError: the model cannot be used.
        """
        await self.models.start()
        self._tasks = [asyncio.create_task(self._batcher.work()), asyncio.create_task(self.models.watch())]

    async def stop(self) -> None:
        """End what runs beside requests, and write what is still to be logged."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._batcher.close()
        self.models.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)
        if self._log is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._log.close)

    def state(self) -> dict[str, Any]:
        """What /health/ready tells."""
        models, reason = self.models, None
        if self.draining:
            reason = "the service is about to end"
        elif models.current is None:
            reason = "the model is being loaded"
        found: dict[str, Any] = {"ready": reason is None}
        if reason is not None:
            found["reason"] = reason
        for name, model in (("model", models.current), ("previous", models.previous)):
            if model is not None:
                found[name] = model.version
        return found | ({"problem": models.problem} if models.problem else {})

    async def receive(self, length: str | None, pieces: AsyncIterator[bytes], deadline_ms: str | None) -> Received:
        """A request's body, in time.

        Args:
            length: the header Content-Length.
            pieces: the body as it arrives.
            deadline_ms: the header X-Deadline-Ms.

        Raises:
            Refused: with the status that says why.
        """
        start = asyncio.get_running_loop().time()
        milliseconds = self._milliseconds(deadline_ms)
        if self.models.current is None:
            raise shed("the model is being loaded: try again", "loading", 5.0)
        body = await self._reader.read(length, pieces)
        end = asyncio.get_running_loop().time()
        self.metrics.seconds.labels("read", "").observe(end - start)
        return Received(body, end, end + milliseconds / 1000)

    async def answer(self, received: Received) -> dict[str, Any]:
        """`probabilities`, the `model` that gave all of them, and the request's `id`.

        Raises:
            Refused: with the status that says why.
        """
        loop, model = asyncio.get_running_loop(), self.models.current
        assert model is not None
        with self._batcher.place(received.deadline):
            tree, request, encoded = await self._encoded(model, received.body, received.deadline)
            self.metrics.seconds.labels("encode", model.version).observe(loop.time() - received.at)
            scores = await self._batcher.score(model, encoded, received.deadline)
        self.metrics.candidates.labels(model.version).inc(len(scores))
        self.metrics.seconds.labels("whole", model.version).observe(loop.time() - received.at)
        name = tree.get("id")
        name = uuid.uuid4().hex if name is None else name
        if self._log is not None:
            self._log.take(name, request, scores, model)
        return {"id": name, "probabilities": scores, "model": model.version}

    def _milliseconds(self, text: str | None) -> float:
        try:
            value = self.spec.queue.deadline_ms if text is None else float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= _LONGEST_MS:
            raise Refused(400, f"X-Deadline-Ms: {(text or '')[:40]!r} is no number of milliseconds up to an hour")
        return value

    async def _encoded(self, model: Model, body: bytes, deadline: float) -> tuple[Any, Request, Encoded]:
        """In a thread: the event loop has other clients."""

        def work() -> tuple[Any, Request, Encoded]:
            try:
                tree = parse_json(body, self.spec.limits)
                request = model.parse(tree)
                return tree, request, model.encode(request)
            except InputError as error:
                raise Refused(422, str(error)) from None

        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.get_running_loop().run_in_executor(self._encoders, work)
        except TimeoutError:
            raise shed("the deadline passed before the request was encoded", "deadline", self._batcher.foreseen()) from None

    def _counted(self) -> dict[tuple[str, str], dict[str, float]]:
        """What the scorers count by themselves."""
        found: dict[tuple[str, str], dict[str, float]] = {}
        for model in filter(None, (self.models.current, self.models.previous)):
            found |= {(name, model.version): values for name, values in model.counts().items()}
        return found
