"""The model in use and the one before it: what the pointer leads to is loaded beside them and taken into use at once."""

import asyncio
import gc
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ctrsink.config.serve import ServeSpec
from ctrsink.errors import InputError, first_line
from ctrsink.request_lines import require_model
from ctrsink.serve.metrics import Metrics
from ctrsink.serve.model import Model
from ctrsink.serve.pointer import resolve

_LONGEST_S = 60.0  # between two tries of a model that cannot be used
T = TypeVar("T")
log = logging.getLogger("ctrsink.serve")


class Models:
    """At most two models are held: the one in use, and the one before it, to which the way back takes no loading.

    Args:
        spec: where the pointer is, and how often it is looked at.
        metrics: told of every swap.
        load: gives the model in a folder, warm.
    """

    def __init__(self, spec: ServeSpec, metrics: Metrics, load: Callable[[str], Model]) -> None:
        self._spec, self._metrics, self._load = spec, metrics, load
        self._thread = ThreadPoolExecutor(1, "ctrsink-load")
        self.current: Model | None = None
        self.previous: Model | None = None
        self.problem: str | None = None
        """Why what the pointer leads to is not in use."""
        self.watched = False

    async def start(self) -> None:
        """Load and warm up the first model.

        Raises:
            InputError: it cannot be used.
        """
        target = await self._in_thread(resolve, self._spec.model)
        self.watched = target.watched
        self._take(await self._in_thread(self._load, target.folder))
        # All that is here now stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()

    async def watch(self) -> None:
        """Follow the pointer, for ever; a model that cannot be used leaves the others as they are, and is tried again later."""
        failed, pause, again = "", 0.0, 0.0
        while self.watched:
            await asyncio.sleep(self._spec.watch_seconds)
            folder = ""
            try:
                folder = (await self._in_thread(resolve, self._spec.model)).folder
                if folder == failed and asyncio.get_running_loop().time() < again:
                    continue
                await self._follow(folder)
            except Exception as error:  # whatever it is, the model in use goes on
                pause = min(2 * pause, _LONGEST_S) if folder == failed and self.problem else self._spec.watch_seconds
                self._tell(error)
                failed, again = folder, asyncio.get_running_loop().time() + pause
            else:
                self.problem, failed = None, ""
                self._metrics.wrong.set(0)

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _follow(self, folder: str) -> None:
        assert self.current is not None
        if folder == self.current.folder:
            return
        if self.previous is not None and folder == self.previous.folder:
            self.current, self.previous = self.previous, self.current
            self._told("back")
            return
        await self._in_thread(require_model, folder)
        self._let_go()  # before the next is loaded: two are held, never three
        model = await self._in_thread(self._load, folder)
        if lacking := sorted(set(model.fields) - set(self.current.fields)):
            log.warning("model %s needs fields of items that the one before did not: %s", model.version, ", ".join(lacking))
        self._take(model)

    def _take(self, model: Model) -> None:
        self.current, self.previous = model, self.current
        self._told("swapped")

    def _told(self, outcome: str) -> None:
        assert self.current is not None
        self._metrics.swaps.labels(outcome).inc()
        for model in filter(None, (self.previous, self.current)):
            self._metrics.model.labels(model.version).set(model is self.current)
        log.info("model %s is in use", self.current.version)

    def _let_go(self) -> None:
        if self.previous is not None:
            self._metrics.forget(self.previous.version)
            self.previous = None

    def _tell(self, error: Exception) -> None:
        assert self.current is not None
        before, known = self.problem, isinstance(error, InputError)
        self.problem = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
        self._metrics.wrong.set(1)
        if self.problem != before:
            self._metrics.swaps.labels("failed").inc()
            log.error("%s; %s goes on", self.problem, self.current.version, exc_info=not known)

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)
