"""The metrics of a router (``kvcache route``). Labels are closed sets: no worker, model, tenant or prompt."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


def new_registry() -> CollectorRegistry:
    """An empty one, of a process whose counters do not publish when they were made: a series each, of no
    use."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # The library does not type it.
    return CollectorRegistry()


class RouteMetrics:
    """One process has one of these, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = new_registry()
        self.requests = self._counter("requests", "Requests answered.", "route", "status")
        self.first_byte = Histogram(
            "kvcache_route_first_byte_seconds",
            "Seconds from a request for a completion to the first byte of its answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.choices = self._counter("choices", "Choices of a worker, by how it was picked.", "how")
        self.blind = self._counter("blind_choices", "Choices made without the index.")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of the prompts that were routed.")
        self.cached_tokens = self._counter(
            "cached_tokens", "Of them, those that the chosen worker was believed to have."
        )
        self.tokenized = self._counter(
            "tokenized",
            "Prompts by where their tokens are from: given, a worker, unknown.",
            "source",
        )
        self.failures = self._counter(
            "worker_failures",
            "Requests that a worker did not answer (before) or not to its end (after).",
            "when",
        )
        self.running = self._gauge("requests_running", "Requests being answered.")
        self.workers_up = self._gauge("workers_up", "Workers that are not passed over.")
        self.workers = self._gauge("workers", "Workers in the file of workers.")

    def render(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)

    @classmethod
    def rows(cls) -> list[str]:
        """A line of docs/metrics.md for each. One with labels is only told of once it has a value."""
        metrics, rows = cls(), []
        metrics.requests.labels("/v1/completions", "200").inc()
        metrics.choices.labels("cheapest").inc()
        metrics.tokenized.labels("given").inc()
        metrics.failures.labels("before").inc()
        for family in metrics.registry.collect():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            rows.append(
                f"| `{name}` | {family.type} | {', '.join(sorted(labels))} | {family.documentation} |"
            )
        return rows

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"kvcache_route_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"kvcache_route_{name}", text, registry=self.registry)
