"""The FastAPI application of a service: routes, statuses, the token; the same under uvicorn and under Ray Serve."""

import asyncio
import hmac
import os
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from ctrsink import __version__, strict_json
from ctrsink.errors import InputError
from ctrsink.serve import requests
from ctrsink.serve.refused import Refused
from ctrsink.serve.service import Service

TOKEN = "CTRSINK_SERVE_TOKEN"
"""Of the environment: where it is set, every route but /health asks for it."""
GONE = 499  # as nginx calls a client that did not wait
T = TypeVar("T")
Mark = dict[str, str]


class Answer(BaseModel):
    """What a request gets."""

    id: Any
    """The request's own, or one made for it: `ctrsink data served` finds its clicks by it."""
    probabilities: list[float]
    """Of a click, for each candidate in their order."""
    model: str
    """The version of the one model that gave them."""


class Failure(BaseModel):
    """Why there is no answer."""

    error: str
    """One sentence."""


_CAUSES = {
    400: "The body is no JSON, or a header is no number.",
    401: "The token is missing or wrong.",
    408: "The body was too slow.",
    413: "The body is too long.",
    422: "The request is not of the form that the model needs.",
    500: "The model cannot score it.",
    503: "Too much waits already, the deadline passed, or the service is about to end: try again after Retry-After seconds.",
}


def build_app(
    service: Service, token: str | None, lifespan: Lifespan[FastAPI] | None = None, mark: Mark | None = None
) -> FastAPI:
    """The application of a service.

    Args:
        token: that clients must send as `Authorization: Bearer TOKEN`; None: none is asked for.
        lifespan: starts and stops the service, where nobody else does.
        mark: headers that go with each score.
    """
    # No pages of documentation: they would be loaded from elsewhere. The schema is at /openapi.json.
    app = FastAPI(
        title="ctrsink",
        version=__version__,
        description="Click probabilities of candidates behind a history.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": Failure, "description": text} for status, text in _CAUSES.items() if status != 401 or token is not None
    }
    body = {"required": True, "content": {"application/json": {"schema": requests.Request.model_json_schema()}}}
    deadline = {
        "name": "X-Deadline-Ms",
        "in": "header",
        "required": False,
        "schema": {"type": "number"},
        "description": "Milliseconds after which nobody waits for the answer any more.",
    }

    @app.post(
        "/v1/score",
        response_model=Answer,
        responses=responses,
        openapi_extra={"requestBody": body, "parameters": [deadline]},
    )
    async def score(request: Request) -> Response:
        """The probability of a click for each candidate, given the history."""
        headers = request.headers
        version = ""
        try:
            received = await service.receive(headers.get("content-length"), request.stream(), headers.get("x-deadline-ms"))
            found = await _while_there(request, service.answer(received))
            version = found["model"]
            response = _json(200, found, mark)
        except ClientDisconnect:
            service.metrics.shed.labels("gone").inc()
            response = Response(status_code=GONE)
        except Refused as error:
            if error.kind:
                service.metrics.shed.labels(error.kind).inc()
            response = _json(error.status, {"error": error.reason}, error.headers)
        service.metrics.requests.labels(response.status_code, version).inc()
        return response

    @app.get("/health/live")
    async def live() -> Response:
        """200 as long as the process answers."""
        return _json(200, {"live": True})

    @app.get("/health/ready")
    async def ready() -> Response:
        """200 where requests are welcome, else 503; which models are held, and what is wrong with the one that is wanted."""
        state = service.state()
        return _json(200 if state["ready"] else 503, state)

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return _json(error.status_code, {"error": str(error.detail)}, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _json(500, {"error": f"the service failed ({type(error).__name__}): its log says more"})

    if token is not None:
        app.add_middleware(_Authorised, token=token)
    return app


def token_of_environment() -> str | None:
    """The token that clients must send, or None.

    Raises:
        InputError: it can be no header.
    """
    token = os.environ.get(TOKEN)
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token and len(token) >= 16):
        raise InputError(f"{TOKEN} is no token: set 16 printable ASCII characters or more, as `openssl rand -hex 32` gives")
    return token


class _Authorised:
    """Lets nobody in without the token, but to /health; no more than the headers were read then."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].startswith("/health/"):
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._expected):
                told = {"WWW-Authenticate": "Bearer", "Connection": "close"}
                response = _json(401, {"error": "send the token as Authorization: Bearer TOKEN"}, told)
                return await response(scope, receive, send)
        await self._app(scope, receive, send)


async def _while_there(request: Request, call: Coroutine[Any, Any, T]) -> T:
    """What `call` gives; it is cancelled when the client goes.

    Raises:
        ClientDisconnect: it went.
    """
    work, gone = asyncio.create_task(call), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientDisconnect
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Until the client hangs up; its body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(strict_json.dumps(content), status, headers, media_type="application/json")
