"""`ctrsink submit`: the same as `ray job submit`, and it follows the job to its end."""

import asyncio
import logging
import os
import re
import shlex
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from ctrsink.config import load_run
from ctrsink.errors import InputError, RunError, first_line
from ctrsink.runtime.reach import require_answer, told

SECRETS = (
    ".env", ".env.*", ".aws", ".azure", ".boto", ".config", ".docker", ".git", ".git-credentials", ".gnupg", ".huggingface",
    ".kube", ".netrc", ".npmrc", ".pypirc", ".s3cfg", ".ssh", "*.key", "*.pem", "id_rsa*", "id_ed25519*",
)  # fmt: skip
"""Files and folders that programs keep credentials in, as .gitignore would name them; the cluster has its own."""
_OVERRIDE = "RAY_API_SERVER_ADDRESS"
log = logging.getLogger("ctrsink.train")


def submit(config: str, overrides: list[str], address: str | None, working_dir: str, resume: bool) -> dict[str, Any]:
    """Send `working_dir` to the cluster's job server, train there, print its log to stderr until it ends.

    The configuration is checked here first. Credentials do not travel, nor does anything behind a link: the cluster has its own.

    Raises:
        InputError: the configuration is wrong or outside `working_dir`, or the job server cannot be reached or refuses us.
        RunError: the job server failed, or the job ended otherwise than well.
    """
    if not address:
        raise InputError("--address is missing: the URL of the cluster's job server, for example http://127.0.0.1:8265")
    spec = load_run(config, overrides)
    root = Path(working_dir).resolve()
    try:
        inside = Path(config).resolve().relative_to(root)
    except ValueError:
        raise InputError(f"{config} lies outside {root}, the folder that is sent to the cluster: give --working-dir") from None
    entry = ["python", "-m", "ctrsink", "train", "--config", str(inside), *(["--resume"] if resume else []), *overrides]
    _require_server(address)
    links = links_below(root)
    if links:
        log.warning("links are not followed, so what is behind them is not sent to the cluster: %s", ", ".join(links[:5]))
    environment = {"working_dir": str(root), "excludes": [*SECRETS, *map(_pattern, links)]}
    with _failing_at(address), _asked_alone(address):
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=shlex.join(entry), runtime_env=environment)
    print(f"job {job} on {address}", file=sys.stderr)
    try:
        status = asyncio.run(_follow(client, job))
        message = "" if status == JobStatus.SUCCEEDED else client.get_job_info(job).message
    except Exception as error:  # of HTTP, of the job server, of the network: the job itself is there
        lost = f"{type(error).__name__}: {first_line(error)}"
        raise RunError(f"job {job} on {address} can be followed no longer ({lost}); `ray job logs {job}` tells of it") from None
    if status != JobStatus.SUCCEEDED:
        raise RunError(f"job {job} ended {status}: {message}")
    return {"job": job, "status": str(status), "run_dir": spec.run_dir}


def links_below(root: Path) -> list[str]:
    """Every link below `root`, by its path there, sorted."""
    found = []
    for folder, folders, files in os.walk(root):
        places = (Path(folder, name) for name in (*folders, *files))
        found += [str(place.relative_to(root)) for place in places if place.is_symlink()]
    return sorted(found)


def _pattern(path: str) -> str:
    """The pattern of .gitignore that matches this path alone."""
    return "/" + re.sub(r"([\\*?\[\]!# ])", r"\\\1", path)


def _require_server(address: str) -> None:
    """Raise InputError unless `address` is a URL at which somebody answers, or which a proxy answers for."""
    try:
        parts = urlsplit(address)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        parts, port = SplitResult("", "", "", "", ""), 0
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--address {address!r} is no URL of a job server: give one such as http://HOST:8265")
    if parts.scheme in getproxies() and not proxy_bypass(parts.hostname):
        return
    try:
        require_answer(parts.hostname, port)
    except (OSError, ValueError) as error:
        reason = told(error) if isinstance(error, OSError) else first_line(error)
        raise InputError(f"the job server at {address} cannot be reached: {reason}: start the cluster, or correct it") from None


@contextmanager
def _failing_at(address: str) -> Generator[None, None, None]:
    """Whose fault it is that the job was not taken: ours (InputError) or the server's (RunError)."""
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
    raise kind(f"the job server at {address} did not take the job: {reason[:300]}")


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


async def _follow(client: JobSubmissionClient, job: str) -> JobStatus:
    async for lines in client.tail_job_logs(job):
        sys.stderr.write(lines)
    status = client.get_job_status(job)
    while not status.is_terminal():
        await asyncio.sleep(1)
        status = client.get_job_status(job)
    return status
