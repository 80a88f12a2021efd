"""Every metric there is, declared here and in the table of stats that most are made from (``metrics_stats``).

A node answers ``Stats`` with a map of plain numbers. ``STATS`` is the table of those names: the node
fills exactly these, and each becomes one Prometheus metric, ``kvcache_`` and the name, with ``_total``
behind it for a counter. What the node has not counted yet is 0.

The HTTP process adds its own (``HttpMetrics``). docs/metrics.md is ``document()``, written by
``python -m kvcache.metrics``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvcache import __version__
from kvcache.metrics_route import RouteMetrics, new_registry
from kvcache.metrics_stats import OTHER, PREFIX, STATS, Stat

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def unknown_names(values: Iterable[str]) -> list[str]:
    """The names that are not in the table. A node's own test holds this to be empty."""
    known = {name for stat in STATS for name in stat.names}
    named = tuple(f"{stat.name}:" for stat in STATS if stat.is_open)
    return sorted(name for name in set(values) - known if not name.startswith(named))


class NodeCollector(Collector):
    """The node's stats as metrics: those of the last ``update``, none before the first."""

    def __init__(self) -> None:
        self._values: Mapping[str, float] = {}

    def update(self, values: Mapping[str, float]) -> None:
        self._values = values

    def collect(self) -> Iterable[Metric]:
        return [_family(stat, self._values) for stat in STATS] if self._values else []


class HttpMetrics:
    """The metrics of one HTTP process, and the registry that shows them and the node's."""

    def __init__(self) -> None:
        self.registry = new_registry()
        self.node = NodeCollector()
        self.registry.register(self.node)
        build = Gauge("kvcache_build_info", "Always 1; the release.", ["version"], registry=self.registry)
        build.labels(__version__).set(1)
        self.requests = Counter(
            "kvcache_http_requests", "HTTP requests answered.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "kvcache_http_request_seconds",
            "Seconds from an HTTP request to its answer.",
            ["route"],
            buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
            registry=self.registry,
        )
        self.node_connected = self._gauge("kvcache_node_connected", "1 while this process reaches its node.")
        self.index_synced = self._gauge(
            "kvcache_index_synced", "1 while the locality index follows the node."
        )
        self.index_entries = self._gauge(
            "kvcache_index_entries", "Blocks in the locality index, each counted once a namespace and tier."
        )
        self.index_bytes = self._gauge("kvcache_index_bytes", "Memory that the locality index takes.")
        self.index_refused = Counter(
            "kvcache_index_refused_blocks",
            "Blocks the locality index had no room for.",
            registry=self.registry,
        )
        self._refused = 0
        self.index_lookups = Counter(
            "kvcache_index_lookups", "Questions answered in raw frames.", registry=self.registry
        )
        self.index_connections = self._gauge("kvcache_index_connections", "Connections for raw frames.")
        self._lookups: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._looked_up = 0
        self.index_resyncs = Counter(
            "kvcache_index_resyncs",
            "Times the stream of a node's events ended and was taken up again, by reason.",
            ["reason"],
            registry=self.registry,
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """One request. REQUIRES: ``route`` is one of ours, as written, never the path that was sent."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def count_refused(self, blocks: int) -> None:
        """``blocks`` so far. REQUIRES: not less than before."""
        self.index_refused.inc(blocks - self._refused)
        self._refused = blocks

    def watch_lookups(self, lookups: Callable[[], tuple[int, int]]) -> None:
        """``lookups`` tells how many questions there were so far, and how many connections there are."""
        self._lookups = lookups

    def render(self) -> bytes:
        """The page that Prometheus reads."""
        asked, connections = self._lookups()
        self.index_lookups.inc(asked - self._looked_up)
        self._looked_up = asked
        self.index_connections.set(connections)
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)


def document() -> str:
    """docs/metrics.md."""
    metrics = HttpMetrics()
    metrics.node.update({"uptime_seconds": 0.0})
    metrics.answered("/healthz", 200, 0.0)  # A labelled metric is shown once it has a value.
    metrics.index_resyncs.labels("gap").inc()
    labels = {stat.metric: stat.label for stat in STATS}
    rows = []
    for family in metrics.registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        label = labels.get(name) or ", ".join(_own_labels(family))
        rows.append(f"| `{name}` | {family.type} | {label} | {family.documentation} |")
    route = "\n".join(RouteMetrics.rows())
    return _DOCUMENT.format(rows="\n".join(rows), reasons="\n".join(_value_rows()), route=route)


def _own_labels(family: Metric) -> list[str]:
    return sorted({label for sample in family.samples for label in sample.labels} - {"le"})


def _value_rows() -> list[str]:
    return [f"| `{stat.metric}` | {stat.label} | {_value_list(stat)} |" for stat in STATS if stat.label]


def _value_list(stat: Stat) -> str:
    if stat.label == "code":
        return "those of [errors](errors.md), other"
    return "as the node's settings name them" if stat.is_open else ", ".join((*stat.values, OTHER))


def _family(stat: Stat, values: Mapping[str, float]) -> Metric:
    make = CounterMetricFamily if stat.kind == "counter" else GaugeMetricFamily
    name = f"{PREFIX}{stat.name}"
    if not stat.label:
        return make(name, stat.help, value=values.get(stat.name, 0.0))
    family = make(name, stat.help, labels=[stat.label])
    for value, sent in zip(stat.values, stat.names, strict=True):
        family.add_metric([value], values.get(sent, 0.0))
    if stat.is_open:
        for sent, number in values.items():
            if sent.startswith(f"{stat.name}:"):
                family.add_metric([sent.partition(":")[2]], number)
        return family
    rest = sum(
        number
        for sent, number in values.items()
        if sent.startswith(f"{stat.name}:") and sent not in stat.names
    )
    if rest:
        family.add_metric([OTHER], rest)
    return family


_DOCUMENT = """# Metrics

`GET /metrics` on a node's HTTP address, in Prometheus' text format. Written by
`python -m kvcache.metrics > docs/metrics.md` from the one table in `kvcache/metrics.py`.
Counters end in `_total` and start at 0 with the node. No label holds a tenant, a key or a prompt.
Which of them to look at when the hit ratio fell: [hit-ratio](hit-ratio.md).

| metric | kind | labels | meaning |
| --- | --- | --- | --- |
{rows}

The values a label can have:

| metric | label | values |
| --- | --- | --- |
{reasons}

`GET /metrics` of [`kvcache route`](routing.md):

| metric | kind | labels | meaning |
| --- | --- | --- | --- |
{route}
"""

if __name__ == "__main__":
    sys.stdout.write(document())
