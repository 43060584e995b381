"""Score requests of any number, in this process or with Ray Data."""

from dataclasses import replace
from typing import Any

from ctrsink import storage
from ctrsink.errors import InputError
from ctrsink.prepare.execute import in_process
from ctrsink.runtime.process import stay_on_loopback
from ctrsink.runtime.reach import cluster_address
from ctrsink.scoring.files import request_files
from ctrsink.scoring.job import ScoreJob


def score_here(job: ScoreJob) -> dict[str, Any]:
    """Score in this process, a block at a time; see ScoreJob.run."""
    return job.run(in_process)


def score_on_ray(job: ScoreJob, address: str | None, workers: int, cpus: int) -> dict[str, Any]:
    """Score by `workers` actors with `cpus` threads each, on the cluster at `address`, RAY_ADDRESS, or one that is started here.

    Raises:
        InputError: the cluster cannot be reached, or a path means nothing there; see ScoreJob.run.
    """
    request_files(job.input)
    joined = cluster_address(address, "--address")
    for name, place in (("--model", job.model), ("--base", job.base), ("--input", job.input), ("--output", job.to)):
        if joined and place and not storage.is_remote(place) and not storage.local_path(place).is_absolute():
            hint = "use s3://, or an absolute path of a folder that all nodes share"
            raise InputError(f"{name} {place} is relative, which means nothing on a cluster: {hint}")
    stay_on_loopback(address)
    from ctrsink.runtime.ray_data import ray_data_actors

    # Ray's workers run in folders of their own.
    base = None if job.base is None else storage.absolute(job.base)
    whole = replace(
        job, base=base, model=storage.absolute(job.model), input=storage.absolute(job.input), to=storage.absolute(job.to)
    )
    return whole.run(ray_data_actors(address, workers, cpus, job.device))
