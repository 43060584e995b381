"""The way to a cluster's job server: whether anybody answers, whether it asks for a token, whose fault a failure is."""

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from ctrsink.errors import InputError, RunError, first_line
from ctrsink.runtime.reach import PATIENCE_S, require_answer, told

_OVERRIDE = "RAY_API_SERVER_ADDRESS"


def connected(address: str | None, doing: str) -> JobSubmissionClient:
    """A client of the job server at `address`; `doing` says in messages what the server did not do.

    Raises:
        InputError: there is no address, it is no URL, nobody answers there or we are refused.
        RunError: the server failed.
    """
    require_server(address)
    assert address is not None
    with answering(address, doing), _asked_alone(address):
        return JobSubmissionClient(address)


def require_server(address: str | None) -> None:
    """Raise InputError unless `address` is a URL at which somebody answers, or which a proxy answers for."""
    if not address:
        raise InputError("--address is missing: the URL of the cluster's job server, for example http://127.0.0.1:8265")
    try:
        parts = urlsplit(address)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        parts, port = SplitResult("", "", "", "", ""), 0
    if "@" in address:  # not shown: what stands before it is meant to be secret
        raise InputError("--address holds a user or a password: leave them out; RAY_AUTH_TOKEN_PATH names the cluster's token")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--address {address!r} is no URL of a job server: give one such as http://HOST:8265")
    if parts.scheme in getproxies() and not proxy_bypass(parts.hostname):
        return
    try:
        require_answer(parts.hostname, port)
    except (OSError, ValueError) as error:
        reason = told(error) if isinstance(error, OSError) else first_line(error)
        raise InputError(f"the job server at {address} cannot be reached: {reason}: start the cluster, or correct it") from None


def require_token(address: str) -> None:
    """Raise InputError where the job server takes jobs from anybody: whoever reaches it runs programs there."""
    try:
        answer = requests.get(f"{address.rstrip('/')}/api/jobs/", timeout=PATIENCE_S, allow_redirects=False)
    except requests.RequestException:
        return  # what is wrong is told by the request that comes next
    if answer.status_code == 200:
        raise InputError(
            f"the job server at {address} asks for no token, so whoever reaches it runs programs there: start the cluster with "
            "RAY_AUTH_MODE=token, or give --allow-unauthenticated"
        )


@contextmanager
def answering(address: str, doing: str) -> Generator[None, None, None]:
    """Whose fault it is that a request failed: ours (InputError) or the server's (RunError)."""
    try:
        yield
    except requests.HTTPError as error:
        status, reason = error.response.status_code if error.response is not None else 0, first_line(error)
    except (AuthenticationError, OSError, ValueError, KeyError, RuntimeError) as error:
        found = re.match(r"Request failed with status code (\d+)", str(error))
        status, reason = int(found[1]) if found else 0, first_line(error)
    else:
        return
    kind = RunError if status >= 500 else InputError
    raise kind(f"the job server at {address} did not {doing}: {reason[:300]}")


@contextmanager
def _asked_alone(address: str) -> Generator[None, None, None]:
    """Ray's client would prefer what the environment says to the address that it is given."""
    before = os.environ.get(_OVERRIDE)
    os.environ[_OVERRIDE] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[_OVERRIDE]
        else:
            os.environ[_OVERRIDE] = before
