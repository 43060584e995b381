"""Metrics of a service for Prometheus: by model version and phase, never by user."""

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

disable_created_metrics()
PREFIX = "ctrsink_serve_"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = tuple(float(4**power) for power in range(1, 10))


class Metrics:
    """All that a service counts; each has a registry of its own.

    A series is of a version as long as that model is held.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of: Any = {"registry": self.registry}
        self.requests = Counter(f"{PREFIX}requests", "Answered requests.", ["status", "version"], **of)
        self.candidates = Counter(f"{PREFIX}candidates", "Scored candidates.", ["version"], **of)
        self.seconds = Histogram(
            f"{PREFIX}phase_seconds",
            "Time of a request: read (its body), then encode (wait and work), queue, model (its batch), whole.",
            ["phase", "version"],
            buckets=_SECONDS,
            **of,
        )
        self.shed = Counter(f"{PREFIX}shed", "Requests that were not scored, by cause.", ["cause"], **of)
        self.waiting = Gauge(f"{PREFIX}waiting_requests", "Accepted requests that are not answered yet.", **of)
        self.waiting_tokens = Gauge(f"{PREFIX}waiting_tokens", "Tokens that wait for the model.", **of)
        self.batch_tokens = Histogram(f"{PREFIX}batch_tokens", "Tokens of a batch.", ["version"], buckets=_SIZES, **of)
        self.batch_requests = Histogram(f"{PREFIX}batch_requests", "Requests of a batch.", ["version"], buckets=_SIZES, **of)
        self.swaps = Counter(f"{PREFIX}swaps", "Models that were to be taken into use, by what came of it.", ["outcome"], **of)
        self.model = Gauge(f"{PREFIX}model", "1 for the model in use, 0 for the one kept for going back.", ["version"], **of)
        self.wrong = Gauge(f"{PREFIX}model_wrong", "1 where the pointer leads to a model that cannot be used.", **of)
        self.logged = Counter(f"{PREFIX}logged", "Requests of the sample that were written down, or dropped.", ["outcome"], **of)
        self.seconds.labels("read", "")
        for cause in ("deadline", "full", "gone", "loading", "reading", "tokens"):
            self.shed.labels(cause)
        for outcome in ("swapped", "back", "failed"):
            self.swaps.labels(outcome)
        for outcome in ("written", "dropped"):
            self.logged.labels(outcome)

    def watch(self, tell: Callable[[], dict[tuple[str, str], dict[str, float]]]) -> None:
        """Ask `tell` at each look for what models count by themselves.

        It gives values by `(name, version)`; what ends in `_total` is a counter by `outcome`, else a gauge by `kind`.
        """
        self.registry.register(_Told(tell))

    def forget(self, version: str) -> None:
        """Drop the series of a model that is let go."""
        for metric in (self.requests, self.candidates, self.seconds, self.batch_tokens, self.batch_requests, self.model):
            metric.remove_by_labels({"version": version})

    def page(self) -> bytes:
        """All of them in the text format of Prometheus."""
        return generate_latest(self.registry)


class _Told:
    """A collector of prometheus_client."""

    def __init__(self, tell: Callable[[], dict[tuple[str, str], dict[str, float]]]) -> None:
        self._tell = tell

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for (name, version), values in self._tell().items():
            total = name.endswith("_total")
            family = families.get(name)
            if family is None:
                kind, label = (CounterMetricFamily, "outcome") if total else (GaugeMetricFamily, "kind")
                family = kind(PREFIX + name, f"{name.replace('_', ' ')} of the model.", labels=[label, "version"])
                families[name] = family
            for word, value in values.items():
                family.add_metric([word, version], value)  # pyright: ignore[reportAttributeAccessIssue]
        return families.values()
