"""Runs the measurements of stream_job.py one after another, each in a fresh interpreter."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contestants import Task

log = logging.getLogger("ctrsink.benchmarks")
ROOT = Path(__file__).resolve().parent.parent

Who = tuple[str, int]
"""A contestant and its number of loader processes."""


@dataclasses.dataclass(frozen=True)
class Jobs:
    """Measurements of the contestants before the data of `task`."""

    task: Task
    repeats: int

    def once(self, who: Who, job: str, **options: Any) -> dict[str, Any]:
        """The result of one job.

        Raises:
            SystemExit: it failed; it has said why.
        """
        contestant, workers = who
        task = dataclasses.replace(self.task, contestant=contestant, workers=workers)
        log.info("%s of %s with %d workers", job, contestant, workers)
        arguments = [job, json.dumps(dataclasses.asdict(task)), json.dumps(options)]
        command = [sys.executable, "-m", "benchmarks.stream_job", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self._environment(), stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{job} of {contestant} failed, see above")
        return json.loads(done.stdout.splitlines()[-1])

    def rounds(self, everybody: Sequence[Who], job: str, **options: Any) -> dict[Who, list[dict[str, Any]]]:
        """Everybody once, then everybody again: what disturbs the machine for a while disturbs all."""
        found: dict[Who, list[dict[str, Any]]] = {who: [] for who in everybody}
        for seed in range(self.repeats):
            for who in everybody:
                found[who].append(self.once(who, job, seed=seed, **options))
        return found

    def _environment(self) -> dict[str, str]:
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": self.task.scratch, "TOKENIZERS_PARALLELISM": "false"}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        # mosaicml-streaming knows the endpoint by another name.
        return os.environ | quiet | ({"S3_ENDPOINT_URL": endpoint} if endpoint else {})
