"""A service as one process: uvicorn, without Ray."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any

import uvicorn

from ctrsink.config.serve import ServeSpec
from ctrsink.serve.app import build_app, token_of_environment
from ctrsink.serve.listen import KEPT_S, listen
from ctrsink.serve.service import Service

_LAST_S = 30  # for requests that are still being answered when all is to end
log = logging.getLogger("ctrsink.serve")


def serve_plain(spec: ServeSpec, host: str, port: int) -> dict[str, Any]:
    """Serve until SIGTERM or SIGINT, and answer then what was accepted.

    Port 0 takes a free one; the log says which.

    Raises:
        InputError: the model cannot be used, or somebody else listens there.
    """
    return asyncio.run(_serve(spec, host, port))


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would end by the signal itself, and at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(spec: ServeSpec, host: str, port: int) -> dict[str, Any]:
    service = Service(spec)
    app = build_app(service, token_of_environment())
    listening = listen(host, port)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=KEPT_S,
        timeout_graceful_shutdown=_LAST_S,
    )
    server = _Server(config)
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    log.info("listening on http://%s:%d", host, listening.getsockname()[1])
    serving = asyncio.create_task(server.serve([listening]))
    loading = asyncio.create_task(service.start())
    asked = asyncio.create_task(ending.wait())
    try:
        # /health/live answers while the model is loaded; one that cannot be used ends it all.
        await asyncio.wait({loading, asked, serving}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            log.info("ready")
            await asyncio.wait({asked, serving}, return_when=asyncio.FIRST_COMPLETED)
        if ending.is_set():
            service.draining = True
            log.info("asked to end: answering what was accepted")
            await asyncio.sleep(spec.drain_seconds)
    finally:
        server.should_exit = True
        loading.cancel()
        asked.cancel()
        await serving
        await service.stop()
    return {"ended": "every accepted request was answered"}
