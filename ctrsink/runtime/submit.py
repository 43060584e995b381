"""`ctrsink submit`: the same as `ray job submit`, and it follows the job to its end."""

import asyncio
import shlex
import sys
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from ctrsink.config import load_run
from ctrsink.errors import InputError, RunError, first_line


def submit(config: str, overrides: list[str], address: str | None, working_dir: str, resume: bool) -> dict[str, Any]:
    """Send `working_dir` to the cluster's job server, train there, print its log to stderr until it ends.

    The configuration is checked here first. Credentials do not travel: the cluster has its own.

    Raises:
        InputError: the configuration is wrong or outside `working_dir`, or the job server cannot be reached or refuses us.
        RunError: the job ended otherwise than well.
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
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=shlex.join(entry), runtime_env={"working_dir": str(root)})
    except (AuthenticationError, ConnectionError, RuntimeError) as error:
        raise InputError(f"the job server at {address} did not take the job: {first_line(error)}") from None
    print(f"job {job} on {address}", file=sys.stderr)
    status = asyncio.run(_follow(client, job))
    if status != JobStatus.SUCCEEDED:
        raise RunError(f"job {job} ended {status}: {client.get_job_info(job).message}")
    return {"job": job, "status": str(status), "run_dir": spec.run_dir}


async def _follow(client: JobSubmissionClient, job: str) -> JobStatus:
    async for lines in client.tail_job_logs(job):
        sys.stderr.write(lines)
    status = client.get_job_status(job)
    while not status.is_terminal():
        await asyncio.sleep(1)
        status = client.get_job_status(job)
    return status
