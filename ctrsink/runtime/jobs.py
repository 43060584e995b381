"""`ctrsink jobs`: what `ray job` does with the jobs of a cluster, told as the other verbs tell it."""

import asyncio
import re
import sys
from datetime import UTC, datetime
from typing import Any

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ctrsink.errors import InputError, RunError, first_line
from ctrsink.runtime.job_server import answering, connected

RUN_DIR, WORK = "ctrsink_run_dir", "ctrsink_work"
"""Keys of a job's metadata: where its run lies, and a hash of what was sent and started."""
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def list_jobs(address: str | None) -> list[dict[str, Any]]:
    """Every job that the cluster knows, the newest first."""
    client = connected(address, "list its jobs")
    with answering(str(address), "list its jobs"):
        found = client.list_jobs()
    # What a driver of its own started is no job of the job server, and cannot be asked for or stopped there.
    submitted = [details for details in found if details.submission_id]
    return [_row(details) for details in sorted(submitted, key=lambda details: -(details.start_time or 0))]


def job_status(address: str | None, job: str) -> dict[str, Any]:
    """What is known of one job."""
    require_id(job)
    client = connected(address, f"tell of the job {job}")
    with answering(str(address), f"tell of the job {job}"):
        details = _known(client, address, job)
    return _row(details) | {"message": _message(details), "entrypoint": details.entrypoint}


def job_logs(address: str | None, job: str, follow_it: bool) -> JobStatus:
    """Print a job's log to stdout, to its end where `follow_it`; returns its status.

    Raises:
        RunError: the job that was followed ended otherwise than well.
    """
    require_id(job)
    client = connected(address, f"tell of the job {job}")
    with answering(str(address), f"tell of the job {job}"):
        details = _known(client, address, job)
        if not follow_it:
            sys.stdout.write(client.get_job_logs(job))
            return details.status
    return follow(client, str(address), job, sys.stdout)


def stop_job(address: str | None, job: str) -> dict[str, Any]:
    """Have a job's processes ended; what it had not saved is lost."""
    require_id(job)
    client = connected(address, f"stop the job {job}")
    with answering(str(address), f"stop the job {job}"):
        details = _known(client, address, job)
        stopped = client.stop_job(job)
    return {"job": job, "status": "asked to end" if stopped else f"had ended: {details.status.value}"}


def follow(client: JobSubmissionClient, address: str, job: str, to: Any) -> JobStatus:
    """Print a job's log until it ends.

    Raises:
        RunError: it ended otherwise than well, or can be followed no longer.
        KeyboardInterrupt: with a line on stderr that says how to come back: the job goes on.
    """
    try:
        status = asyncio.run(_follow(client, job, to))
        message = "" if status == JobStatus.SUCCEEDED else _message(client.get_job_info(job))
    except KeyboardInterrupt:
        print(f"\njob {job} goes on without this terminal\n{how_to_come_back(address, job)}", file=sys.stderr)
        raise
    except Exception as error:  # of HTTP, of the job server, of the network: the job itself is there
        lost = f"{type(error).__name__}: {first_line(error)}"
        raise RunError(f"job {job} on {address} can be followed no longer ({lost}); `ray job logs {job}` tells of it") from None
    if status != JobStatus.SUCCEEDED:
        raise RunError(f"job {job} ended {status.value}: {message}")
    return status


def how_to_come_back(address: str, job: str) -> str:
    """The commands that follow or end a job that goes on."""
    return (
        f"  follow it:  ctrsink jobs logs --follow {job} --address {address}\n"
        f"  end it:     ctrsink jobs stop {job} --address {address}"
    )


def require_id(job: str) -> None:
    """Raise InputError where this can be no id of a job: it becomes a part of the job server's URLs."""
    if not _ID.fullmatch(job):
        raise InputError(f"{job[:120]!r} is no id of a job: up to 100 letters, digits, _, - and dots, and no dot first")


def find(client: JobSubmissionClient, job: str) -> JobDetails | None:
    """What the server knows of a job; None where it has no such job."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if str(error).startswith("Request failed with status code 404"):
            return None
        raise


def _known(client: JobSubmissionClient, address: str | None, job: str) -> JobDetails:
    details = find(client, job)
    if details is None:
        raise InputError(f"the job server at {address} has no job {job}: `ctrsink jobs list --address {address}` tells which")
    return details


def _row(details: JobDetails) -> dict[str, Any]:
    return {
        "job": details.submission_id,
        "status": details.status.value,
        "started": _time(details.start_time),
        "ended": _time(details.end_time),
        "run_dir": (details.metadata or {}).get(RUN_DIR, ""),
    }


def _message(details: JobDetails) -> str:
    """Why a job is where it is; Ray puts the end of the log behind it, which is told elsewhere."""
    return (details.message or "").partition(", last available logs")[0].partition("\n")[0]


def _time(milliseconds: int | None) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds") if milliseconds else ""


async def _follow(client: JobSubmissionClient, job: str, to: Any) -> JobStatus:
    async for lines in client.tail_job_logs(job):
        to.write(lines)
        to.flush()
    status = client.get_job_status(job)
    while not status.is_terminal():
        await asyncio.sleep(1)
        status = client.get_job_status(job)
    return status
