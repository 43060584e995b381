"""A service under Ray Serve: replicas of the same application, and a user's requests go to one of them."""

import asyncio
import contextlib
import logging
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import RequestRouterConfig

from ctrsink import logs
from ctrsink.config import load_serve
from ctrsink.config.serve import ServeSpec
from ctrsink.errors import InputError, RunError, first_line
from ctrsink.runtime.ray_train import connect
from ctrsink.runtime.serve_gauges import Mirror
from ctrsink.runtime.stopping import on_sigterm
from ctrsink.serve.app import TOKEN, build_app, token_of_environment
from ctrsink.serve.listen import KEPT_S, listen
from ctrsink.serve.service import Service

NAME = "ctrsink"
# Ray's proxy reads the header X-Session-Id, and this router sends a session to one replica; others only while that one is full.
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_LAST_S = 30.0
log = logging.getLogger("ctrsink.serve")


def application(spec: ServeSpec, replicas: int, with_token: bool) -> serve.Application:
    """The application for `serve.run`.

    Args:
        replicas: each holds a model of its own, on a GPU of its own where the device is one.
        with_token: each must find the token in its environment; it is never sent there.
    """
    deployment = serve.deployment(
        name=NAME,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": 0 if spec.device == "cpu" else 1},
        # What waits, waits in the replica, which knows its tokens and deadlines; Ray's own queue is for the moment between.
        max_ongoing_requests=2 * spec.queue.requests,
        max_queued_requests=spec.queue.requests,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),  # pyright: ignore[reportArgumentType]
        graceful_shutdown_timeout_s=_LAST_S,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
    )
    return deployment(serve.ingress(_builder(spec, with_token))(_Replica)).bind()


class _Replica:
    """What Ray Serve wraps the application in."""


def build(args: dict[str, Any]) -> serve.Application:
    """For `import_path: ctrsink.runtime.serve:build` of a Serve configuration.

    Args:
        args: keys of ServeSpec; beside them `replicas` (1), and `allow_unauthenticated` (false), without which a token must be in
            the environment.

    Raises:
        InputError: a key or a value is wrong, or there is no token.
    """
    tree = dict(args)
    replicas, open_to_all = tree.pop("replicas", 1), tree.pop("allow_unauthenticated", False)
    if type(replicas) is not int or replicas < 1:
        raise InputError(f"args.replicas: {replicas!r} is no whole number above 0")
    with_token = token_of_environment() is not None
    if not with_token and open_to_all is not True:
        raise InputError(f"no token is set: give {TOKEN} to the pods, or say allow_unauthenticated: true")
    return application(load_serve(tree), replicas, with_token)


def serve_ray(spec: ServeSpec, host: str, port: int, replicas: int, address: str | None) -> dict[str, Any]:
    """Serve until SIGTERM or Ctrl-C on the cluster at `address`, or on one that is started here.

    Raises:
        InputError: the cluster cannot be reached, or somebody else listens there.
        RunError: the replicas do not start; the message says why.
    """
    token = token_of_environment()
    if not address:
        listen(host, port).close()
    connect(address, replicas + 1)
    ended = threading.Event()
    with on_sigterm(lambda reason: ended.set()):
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port, "keep_alive_timeout_s": KEPT_S})
            serve.run(application(spec, replicas, token is not None), name=NAME, route_prefix="/")
            _wait_for_route(host, port)
            log.info("ready on http://%s:%d, %d replicas", host, port, replicas)
            with contextlib.suppress(KeyboardInterrupt):
                ended.wait()
        except RuntimeError as error:
            raise RunError(f"Ray Serve does not serve: {first_line(error)}; `serve status` and its log say more") from None
        finally:
            serve.delete(NAME)  # when what it accepted is answered
            if not address:
                serve.shutdown()
            ray.shutdown()
    return {"ended": "every accepted request was answered"}


def _wait_for_route(host: str, port: int) -> None:
    """Until Ray's proxy knows the way, which it learns after `serve.run`; not where the proxy is on another host."""
    deadline = time.monotonic() + _LAST_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{host}:{port}/health/live", timeout=5):
            return
        time.sleep(0.2)


def _builder(spec: ServeSpec, with_token: bool) -> Callable[[], FastAPI]:
    """What makes the application, called in each replica."""

    def build_here() -> FastAPI:
        logs.configure()
        token = token_of_environment()
        if with_token and token is None:
            raise InputError(f"{TOKEN} is not in the environment of this replica: set it on every node")
        service = Service(spec)

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            await service.start()
            mirror = asyncio.create_task(Mirror(service.metrics.registry, _replica()).keep())
            yield
            mirror.cancel()
            service.draining = True
            await service.stop()

        return build_app(service, token, lifespan, {"X-Replica": _replica()})

    return build_here


def _replica() -> str:
    return serve.get_replica_context().replica_id.unique_id
