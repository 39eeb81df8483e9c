"""What /metrics tells Prometheus."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from manta.serve.served import Served

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
GAUGES = {
    "running": "requests that are being answered",
    "waiting": "requests that wait for a place",
    "cache_bytes": "bytes of what the model remembers of texts",
    "cache_limit": "the most bytes of that",
}
COUNTERS = {
    "requests": "requests whose prompts were read",
    "hits": "requests that began as a text that was remembered",
    "generated": "tokens of answers",
    "prefilled": "tokens of prompts that were computed",
    "cached": "tokens of prompts that were remembered",
    "evicted": "beginnings of texts that were forgotten to make room",
}


class Measures:
    """The numbers of all models, and the name of the replica whose they are, if it has one."""

    def __init__(self, models: Mapping[str, Served], replica: str = ""):
        own = {"replica": replica} if replica else {}
        self._registry = CollectorRegistry()
        first = Histogram(
            "manta_serve_first_token_seconds",
            "from a request to its first token",
            ["model", *own],
            buckets=SECONDS,
            registry=self._registry,
        )
        between = Histogram(
            "manta_serve_between_tokens_seconds",
            "from a token to the next",
            ["model", *own],
            buckets=SECONDS,
            registry=self._registry,
        )
        for name, model in models.items():
            model.watch = _Watch(
                first.labels(name, *own.values()), between.labels(name, *own.values())
            )
        self._registry.register(_Counts(models, own))

    def text(self) -> bytes:
        """The numbers in Prometheus' text format."""
        return generate_latest(self._registry)


class _Watch:
    def __init__(self, first: Histogram, between: Histogram):
        self._first, self._between = first, between

    def started(self, seconds: float) -> None:
        self._first.observe(seconds)

    def between(self, seconds: float) -> None:
        self._between.observe(seconds)


class _Counts(Collector):
    """The engines' counts, at the time when they are asked for."""

    def __init__(self, models: Mapping[str, Served], own: Mapping[str, str]):
        self._models, self._own = models, own

    def collect(self) -> Iterator[Metric]:
        counts = {name: model.engine.counts() for name, model in self._models.items()}
        labels = ["model", *self._own]
        for key, help_text in GAUGES.items():
            gauge = GaugeMetricFamily(f"manta_serve_{key}", help_text, labels=labels)
            for name, count in counts.items():
                gauge.add_metric([name, *self._own.values()], getattr(count, key))
            yield gauge
        for key, help_text in COUNTERS.items():
            counter = CounterMetricFamily(
                f"manta_serve_{key}", help_text, labels=["model", *self._own]
            )
            for name, count in counts.items():
                counter.add_metric([name, *self._own.values()], getattr(count, key))
            yield counter
