"""Whether the workers of a run have room in the cluster: a run that waits for it says so."""

import logging
from collections.abc import Generator
from contextlib import contextmanager

import ray
from ray.util import placement_group_table

from ctrsink.config.train import RuntimeSpec
from ctrsink.run.periodic import Every
from ctrsink.runtime.stalls import PATIENCE_S

log = logging.getLogger("ctrsink.train")


@contextmanager
def told_of_waiting(runtime: RuntimeSpec) -> Generator[None, None, None]:
    """Warn at once where the cluster has less than the run asks for, and when it has waited for places for PATIENCE_S or longer.

    The cluster may grow, so the run waits; workers that have a place tell themselves what they wait for (see Stalls).
    """
    if (lack := missing(runtime)) is not None:
        log.warning("%s: waiting for more, %g s at most", lack, runtime.start_timeout_s)
    waiting = Waiting(runtime)
    looking = Every(PATIENCE_S, waiting.look, "places")
    try:
        yield
    finally:
        looking.close()


class Waiting:
    """Counts looks at which the workers had no place; warns at the second of them, and whenever the number has doubled."""

    def __init__(self, runtime: RuntimeSpec) -> None:
        self._runtime, self._looks = runtime, 0

    def look(self) -> None:
        reason = missing(self._runtime) or (f"{_wanted(self._runtime)} to be free" if _unplaced(self._runtime) else None)
        self._looks = self._looks + 1 if reason else 0
        if self._looks > 1 and (self._looks - 1).bit_count() == 1:
            log.warning("no step for %.0f s: the workers have no place, waiting for: %s", (self._looks - 1) * PATIENCE_S, reason)


def missing(runtime: RuntimeSpec) -> str | None:
    """What the whole cluster lacks for the fewest workers that the run goes on with; None where it has it."""
    there = ray.cluster_resources()
    for name, count in _needs(runtime).items():
        if count > there.get(name, 0):
            return f"{_least(runtime)} workers need {count} {name}s, the cluster has {there.get(name, 0):.0f}"
    return None


def _unplaced(runtime: RuntimeSpec) -> bool:
    """Whether places like those of our workers have been asked for in vain so far."""
    bundle = {"CPU": float(runtime.cpus_per_worker)} | ({"GPU": 1.0} if runtime.device == "cuda" else {})
    groups = [group for group in placement_group_table().values() if group["state"] == "PENDING"]
    return any(all(asked == bundle for asked in group["bundles"].values()) for group in groups)


def _needs(runtime: RuntimeSpec) -> dict[str, int]:
    least = _least(runtime)
    return {"CPU": least * runtime.cpus_per_worker} | ({"GPU": least} if runtime.device == "cuda" else {})


def _wanted(runtime: RuntimeSpec) -> str:
    return " and ".join(f"{count} {name}s" for name, count in _needs(runtime).items())


def _least(runtime: RuntimeSpec) -> int:
    return runtime.workers if isinstance(runtime.workers, int) else runtime.workers.min
