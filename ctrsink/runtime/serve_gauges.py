"""Metrics of a replica through its Ray node: a request for /metrics would reach one replica of many."""

import asyncio

from prometheus_client import CollectorRegistry
from ray.util.metrics import Gauge

_EVERY_S = 5.0


class Mirror:
    """Copies every sample of a registry to a gauge of Ray of the same name, with the tag `replica`.

    Ray puts `ray_` before the name. A counter stays one that only grows, so `rate` of Prometheus works on it.
    """

    def __init__(self, registry: CollectorRegistry, replica: str) -> None:
        self._registry, self._replica = registry, replica
        self._gauges: dict[str, Gauge] = {}

    async def keep(self) -> None:
        """Copy, for ever."""
        while True:
            self.copy()
            await asyncio.sleep(_EVERY_S)

    def copy(self) -> None:
        """Copy once."""
        for metric in self._registry.collect():
            for sample in metric.samples:
                tags = {**sample.labels, "replica": self._replica}
                gauge = self._gauges.get(sample.name)
                if gauge is None:
                    gauge = Gauge(sample.name, description=metric.documentation, tag_keys=tuple(tags))
                    self._gauges[sample.name] = gauge
                gauge.set(sample.value, tags)
