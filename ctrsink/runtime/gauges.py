"""The newest row of a run as Prometheus gauges, through the metrics of the Ray node that the first worker is on."""

import math
import re
from typing import Any

from ray.util.metrics import Gauge

PREFIX = "ctrsink_"
"""Of our names; Ray puts `ray_` before it."""
_TAGGED = re.compile(r"(?P<name>.+)/(?:rank(?P<rank>\d+)|layer(?P<layer>\d+)|(?<=^lr/)(?P<group>\w+))")


def gauge_of(key: str) -> tuple[str, dict[str, str]]:
    """Name and own tags of the gauge of a row's key: `lr/head` is `ctrsink_lr` of group `head`.

    What stands once per rank, layer or group of parameters is one gauge; of other keys whatever Prometheus does not allow
    becomes an underscore.
    """
    found = _TAGGED.fullmatch(key)
    tags = (
        {} if found is None else {tag: value for tag, value in found.groupdict().items() if tag != "name" and value is not None}
    )
    return PREFIX + re.sub(r"\W", "_", key if found is None else found["name"], flags=re.ASCII), tags


class RayGauges:
    """Called with each row: every finite number in it becomes the value of a gauge with the tags `run`, `stage` and its own.

    Ray shows a value until its process ends, so those of a stage that is over stay; the stage with the largest `step` is the
    present one, which is how the board of cluster/grafana tells them apart.

    Args:
        run: the run's name.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def __call__(self, row: dict[str, Any]) -> None:
        shared = {"run": self._run, "stage": row["stage"]}
        for key, value in row.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            name, own = gauge_of(key)
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, "see docs/watching.md of ctrsink", tag_keys=(*shared, *own))
            self._gauges[name].set(value, shared | own)
