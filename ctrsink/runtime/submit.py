"""`ctrsink submit`: pack what a run needs, start it as a job on a Ray cluster, and follow it to its end."""

import hashlib
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient

from ctrsink import storage
from ctrsink.config import RunSpec, load_run
from ctrsink.config.load import files_of
from ctrsink.errors import InputError, listed
from ctrsink.runtime.job_server import answering, connected, require_server, require_token
from ctrsink.runtime.jobs import RUN_DIR, WORK, find, follow, how_to_come_back, require_id
from ctrsink.runtime.package import Package, mib, readable, require_fits, survey, write_archive

_TAKE = "take the job"


def submit(
    config: str,
    overrides: list[str],
    address: str | None,
    working_dir: str,
    resume: bool,
    submission_id: str | None = None,
    detach: bool = False,
    dry_run: bool = False,
    allow_unauthenticated: bool = False,
) -> dict[str, Any]:
    """Send what is needed of `working_dir` to the cluster's job server, train there, print its log to stderr until it ends.

    The configuration is checked here first. Credentials, data and runs do not travel, nor does anything behind a link.

    Args:
        submission_id: of the job; where it is there already with the same work, that job is followed.
        detach: return as soon as the job is taken.
        dry_run: say what would be sent, and send nothing.
        allow_unauthenticated: take a cluster that anybody may send jobs to.

    Raises:
        InputError: the configuration is wrong, or does not hold on other machines, or is not sent; there is too much to send;
            the job server cannot be reached or refuses us, or has another work of that id.
        RunError: the job server failed, or the job ended otherwise than well.
    """
    spec = load_run(config, overrides)
    if submission_id is not None:
        require_id(submission_id)
    if not dry_run:
        require_server(address)
    root = Path(working_dir).resolve()
    package = survey(root)
    inside = _require_sent(package, config)
    require_fits(package)
    _tell(package, every=dry_run)
    if dry_run:
        return {"files": len(package.files), "bytes": package.size, "left_out": package.left_out}
    assert address is not None
    _require_anywhere(spec)
    if not allow_unauthenticated:
        require_token(address)
    entry = ["python", "-m", "ctrsink", "train", "--config", inside, *(["--resume"] if resume else []), *overrides]
    client = connected(address, _TAKE)
    job = _start(client, address, package, shlex.join(entry), spec.run_dir, submission_id)
    if detach:
        print(how_to_come_back(address, job), file=sys.stderr)
        return {"job": job, "run_dir": spec.run_dir}
    status = follow(client, address, job, sys.stderr)
    return {"job": job, "status": status.value, "run_dir": spec.run_dir}


def _start(
    client: JobSubmissionClient, address: str, package: Package, entry: str, run_dir: str, submission_id: str | None
) -> str:
    """The id of the job, which is new or was started with the same work before."""
    with tempfile.TemporaryDirectory(prefix="ctrsink-submit-") as folder, answering(address, _TAKE):
        archive = Path(folder, "package.zip")
        write_archive(package, archive)
        work = hashlib.sha256(archive.read_bytes() + entry.encode()).hexdigest()
        if submission_id is not None and _is_there(client, address, submission_id, work):
            return submission_id
        sent, metadata = {"working_dir": str(archive)}, {RUN_DIR: run_dir, WORK: work}
        try:
            job = client.submit_job(entrypoint=entry, submission_id=submission_id, runtime_env=sent, metadata=metadata)
        except RuntimeError:
            # Of two that submit at the same moment one is refused, and finds the other's here.
            if submission_id is None or not _is_there(client, address, submission_id, work):
                raise
            return submission_id
    print(f"job {job} on {address}", file=sys.stderr)
    return job


def _is_there(client: JobSubmissionClient, address: str, job: str, work: str) -> bool:
    """Whether there is a job of that id, with the same work. Raises InputError where it has another."""
    details = find(client, job)
    if details is None:
        return False
    if (details.metadata or {}).get(WORK) != work:
        raise InputError(
            f"job {job} on {address} ({details.status.value}) was started with other files or other arguments: give another "
            f"--submission-id, or the same work"
        )
    print(f"job {job} on {address} is there with this work, {details.status.value}: nothing is started", file=sys.stderr)
    return True


def _require_sent(package: Package, config: str) -> str:
    """The path of `config` in the package. Raises InputError unless it and all that it includes are sent."""
    inside = ""
    for file in reversed(files_of(config)):  # the configuration itself is the last
        if not file.is_relative_to(package.root):
            raise InputError(f"{file} lies outside {package.root}, the folder that is sent to the cluster: give --working-dir")
        inside = file.relative_to(package.root).as_posix()
        if inside not in package.files:
            raise InputError(f"{file} configures the run but is not sent, being a link or ignored: move it or correct .rayignore")
    return inside


def _require_anywhere(spec: RunSpec) -> None:
    """Raise InputError where a path means another place in the job's own folder, which is removed with it."""
    for key, uri in (("run_dir", spec.run_dir), ("data.uri", spec.data.uri)):
        if not storage.is_remote(uri) and not Path(uri).is_absolute():
            raise InputError(
                f"{key} {uri} is a path in the job's own folder, which holds no data and is removed: give s3://BUCKET/KEY, or "
                "an absolute path on a disk that every node has"
            )
    if spec.model.absolute() != spec.model:
        raise InputError(
            "model: a folder of weights is named by a relative path, and weights are not sent: give an absolute path on a disk "
            "that every node has, or a model of the hub"
        )


def _tell(package: Package, every: bool) -> None:
    """Print what is sent, the largest first, and what is not, to stderr."""
    print(f"{len(package.files)} files, {mib(package.size)}, of {package.root}:", file=sys.stderr)
    shown = package.largest()
    for name, size in shown if every else shown[:5]:
        print(f"  {mib(size):>10}  {readable(name)}", file=sys.stderr)
    if not every and len(shown) > 5:
        print(f"  {'':>10}  and {len(shown) - 5} smaller ones; --dry-run shows all and sends nothing", file=sys.stderr)
    for why, names in package.left_out.items():
        print(f"stays here ({why}): {listed(map(readable, names))}", file=sys.stderr)
