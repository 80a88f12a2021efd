"""The metrics of a router (``kvcache route``). Labels are closed sets: no worker, model, tenant or prompt."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class RouteMetrics:
    """One process has one of these, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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

    def sample(self) -> None:
        """One value for each metric with labels: it is shown once it has one."""
        self.requests.labels("/v1/completions", "200").inc()
        self.choices.labels("cheapest").inc()
        self.tokenized.labels("given").inc()
        self.failures.labels("before").inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"kvcache_route_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"kvcache_route_{name}", text, registry=self.registry)
