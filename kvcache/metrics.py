"""Every metric there is, declared here and nowhere else, and the node's stats that most are made from.

A node answers ``Stats`` with a map of plain numbers. ``STATS`` is the table of those names: the node
fills exactly these, and each becomes one Prometheus metric, ``kvcache_`` and the name, with ``_total``
behind it for a counter. A stat with a label is sent as ``name:value`` (``requests:lease``); its values
are a closed set, so that no tenant, key or prompt can become a label and the number of series is bounded.
What the node has not counted yet is 0.

The HTTP process adds its own (``HttpMetrics``). docs/metrics.md is ``document()``, written by
``python -m kvcache.metrics``.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvcache import __version__
from kvcache.errors import CODES
from kvcache.metrics_route import RouteMetrics
from kvcache.wire import Request

PREFIX = "kvcache_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
TIERS = ("hbm", "host", "nvme")
STREAM_FAILURES = (
    *("lost", "late", "refused", "sums", "gone", "stalled", "full", "busy", "parent"),
    *("fetch", "none", "unknown", "queue"),
)
"""Why blocks that are moved while they are written do not come (docs/streaming.md)."""
REQUESTS = tuple(str(kind.__struct_config__.tag) for kind in typing.get_args(Request))


@dataclass(frozen=True, slots=True)
class Stat:
    """One name in ``StatsReply.values``. ``kind`` is counter or gauge; a counter only grows while the
    node lives. With ``label``, one number for each of ``values`` (and for ``other``)."""

    name: str
    kind: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"

    @property
    def names(self) -> tuple[str, ...]:
        """What the node may send for this stat."""
        return tuple(f"{self.name}:{value}" for value in self.values) if self.label else (self.name,)


STATS: tuple[Stat, ...] = (
    # What clients asked.
    Stat("requests", "counter", "Requests answered or refused, by kind.", "request", REQUESTS),
    Stat("refusals", "counter", "Requests refused, by error code.", "code", tuple(CODES)),
    Stat("connections_opened", "counter", "Connections whose Hello was accepted."),
    Stat("connections_closed", "counter", "Connections of those that have ended."),
    # What they found.
    Stat("match_blocks", "counter", "Blocks asked for by Match."),
    Stat("match_hit_blocks", "counter", "Leading blocks that Match found."),
    Stat("lookup_tokens", "counter", "Tokens of the blocks asked for by leases."),
    Stat(
        "hit_tokens", "counter", "Tokens of the blocks that leases gave: prefill that need not be computed."
    ),
    Stat("saved_tokens", "counter", "Tokens of the blocks committed."),
    Stat(
        "read_bytes", "counter", "Block bytes sent to readers that do not map the slab.", "path", ("socket",)
    ),
    Stat("written_bytes", "counter", "Block bytes received from such writers.", "path", ("socket",)),
    # What peers moved over a transport.
    Stat("exported_blocks", "counter", "Blocks that peers were given a ticket to read."),
    Stat("exported_bytes", "counter", "The bytes of them that they may read with it."),
    Stat("posted_blocks", "counter", "Blocks into which peers have written with a ticket."),
    Stat("posted_bytes", "counter", "The bytes that they wrote."),
    Stat("lent_planes", "counter", "Planes of blocks that followers were given to read while written."),
    Stat("lent_bytes", "counter", "Their bytes."),
    Stat("followers", "gauge", "Peers that wait for blocks to be written."),
    Stat("tickets", "gauge", "Tickets given out and not over."),
    Stat("tickets_expired", "counter", "Tickets that ended because their time was over."),
    # What changed.
    Stat("stored_blocks", "counter", "Blocks published in host memory.", "reason", ("committed",)),
    Stat(
        "removed_blocks",
        "counter",
        "Blocks unpublished in host memory, by reason.",
        "reason",
        ("evicted", "orphaned", "quarantined", "reclaimed"),
    ),
    Stat("short_reservations", "counter", "Reservations of less than asked.", "reason", ("busy", "full")),
    Stat("leases_taken", "counter", "Leases given."),
    # What was recorded of requests.
    Stat("recording", "gauge", "1 while requests are recorded."),
    Stat("recorded_requests", "counter", "Requests recorded."),
    Stat("recorded_bytes", "counter", "Bytes of recordings written."),
    Stat("record_lost_batches", "counter", "Batches of records that the disk did not take in time."),
    Stat("record_failures", "counter", "Recordings that ended because their disk failed."),
    # What went to NVMe and came from there.
    Stat("nvme_written_blocks", "counter", "Blocks written to NVMe."),
    Stat("nvme_written_bytes", "counter", "Their bytes."),
    Stat("nvme_read_blocks", "counter", "Blocks read from NVMe into host memory, verified."),
    Stat("nvme_read_bytes", "counter", "Their bytes."),
    Stat("nvme_restored_blocks", "counter", "Blocks found on NVMe when a device was opened."),
    Stat("nvme_unknown_blocks", "counter", "Blocks found on NVMe whose namespace is not known any more."),
    Stat(
        "nvme_removed_blocks",
        "counter",
        "Blocks unpublished on NVMe, by reason.",
        "reason",
        ("evicted", "fenced", "orphaned", "quarantined", "reclaimed"),
    ),
    Stat(
        "nvme_skipped_blocks",
        "counter",
        "Blocks not written to NVMe, by reason.",
        "reason",
        ("admission", "budget", "error", "full", "gone", "parent", "queue"),
    ),
    Stat("nvme_declined_loads", "counter", "Loads not begun, as computing the blocks anew is faster."),
    Stat("nvme_late_loads", "counter", "Waits for a load that ended without it."),
    Stat("nvme_failed_reads", "counter", "Blocks not read because their device failed."),
    Stat(
        "nvme_rejected_blocks",
        "counter",
        "Blocks whose bytes on NVMe were not what they should be.",
        "reason",
        ("header", "generation", "checksum", "short", "unreadable"),
    ),
    Stat("nvme_fences", "counter", "Times a device was fenced."),
    Stat("nvme_devices", "gauge", "Devices by state.", "state", ("ok", "read_only", "fenced", "loading")),
    Stat("nvme_wanted_blocks", "gauge", "Ends of prefixes that wait to be written."),
    Stat("nvme_coming_bytes", "gauge", "Bytes being read into host memory now."),
    Stat("nvme_read_bytes_per_second", "gauge", "How fast the devices read lately."),
    Stat("nvme_budget_spent_bytes", "gauge", "Bytes of the daily write budget spent in the last 24 hours."),
    # What came from peers.
    Stat("peers", "gauge", "Peers by state.", "state", ("ok", "loading", "lost")),
    Stat("peer_known_blocks", "gauge", "Blocks of peers that this node knows of."),
    Stat("peer_fetched_blocks", "counter", "Blocks brought from peers into host memory, verified."),
    Stat("peer_fetched_bytes", "counter", "Their bytes."),
    Stat("peer_cut_blocks", "counter", "Those of them made of blocks of ranks of another degree."),
    Stat(
        "peer_failed_fetches",
        "counter",
        "Groups of blocks that did not come, or not all, from the peer that was asked.",
        "reason",
        ("lost", "late", "refused", "gone"),
    ),
    Stat(
        "peer_rejected_blocks",
        "counter",
        "Blocks of peers whose bytes were not what they should be.",
        "reason",
        ("checksum",),
    ),
    Stat("peer_declined_fetches", "counter", "Fetches not begun, as computing the blocks anew is faster."),
    Stat("peer_late_fetches", "counter", "Waits for a fetch that ended without it."),
    Stat("streamed_blocks", "counter", "Blocks received from a peer that was still writing them."),
    Stat("streamed_planes", "counter", "Planes received so, those of blocks that did not come whole too."),
    Stat("streamed_bytes", "counter", "Their bytes."),
    Stat(
        "receive_failures",
        "counter",
        "Streams from a peer that ended before all had come, by reason.",
        "reason",
        STREAM_FAILURES,
    ),
    Stat("pushed_blocks", "counter", "Blocks brought to a peer and published there."),
    Stat("pushed_bytes", "counter", "Their bytes."),
    Stat(
        "push_failures",
        "counter",
        "Pushes and copies to a peer that ended before all was there, by reason.",
        "reason",
        STREAM_FAILURES,
    ),
    Stat("replicated_blocks", "counter", "Blocks of hot prefixes copied to peers that lacked them."),
    Stat("replicated_bytes", "counter", "Their bytes."),
    Stat("replication_failures", "counter", "Copies that a peer did not take whole."),
    Stat("peer_coming_bytes", "gauge", "Bytes on their way from peers now."),
    Stat("peer_read_bytes_per_second", "gauge", "How fast the peers gave their blocks lately."),
    Stat("scrub_passes", "counter", "Times all that is on NVMe was verified."),
    Stat("scrubbed_blocks", "counter", "Blocks verified so."),
    Stat("scrub_bad_blocks", "counter", "Blocks found bad so."),
    Stat("scrub_left_blocks", "gauge", "Blocks that this pass has still to verify."),
    # What went wrong, and was caught.
    Stat(
        "rejected_blocks",
        "counter",
        "Blocks whose bytes did not have their sums: found at rest (checksum) or on arrival (transfer).",
        "reason",
        ("checksum", "transfer"),
    ),
    Stat("reader_disagreed_blocks", "counter", "Blocks that a reader reported and the node found intact."),
    Stat("watchers_dropped", "counter", "Followers of events that were too slow and were disconnected."),
    # What is there.
    Stat("capacity_bytes", "gauge", "Bytes a tier may hold.", "tier", TIERS),
    Stat("used_bytes", "gauge", "Bytes of extents in use.", "tier", TIERS),
    Stat("block_bytes", "gauge", "Bytes of the blocks held, being written or set aside.", "tier", TIERS),
    Stat("blocks", "gauge", "Blocks held or being written.", "tier", TIERS),
    Stat("orphans", "gauge", "Blocks that cannot be reached for one missing before them.", "tier", TIERS),
    Stat("leases", "gauge", "Leases held now."),
    Stat("reservations", "gauge", "Reservations open now."),
    Stat("limbo_blocks", "gauge", "Reserved slots whose writer vanished, until it is known to have ended."),
    Stat("quarantined_blocks", "gauge", "Slots set aside because their bytes were wrong."),
    Stat("reclaimed_extents", "gauge", "Extents emptied for blocks of another size since the start."),
    Stat("policy_faults", "gauge", "Faults of the eviction policy, after which the core decides."),
    Stat("policy_changes", "counter", "Times that another eviction policy took over while the node served."),
    Stat("namespaces", "gauge", "Namespaces opened since the start."),
    Stat("arenas", "gauge", "Trust domains with memory of their own."),
    Stat("watchers", "gauge", "Followers of this node's events."),
    Stat(
        "watches",
        "counter",
        "Followers told what they missed, or everything.",
        "answer",
        ("replay", "snapshot"),
    ),
    Stat("events", "counter", "Event batches published."),
    Stat("events_ring_bytes", "gauge", "Bytes of the last batches, kept for followers that missed some."),
    Stat("events_kept_bytes", "gauge", "Bytes taken to know what was told, for snapshots and digests."),
    Stat("uptime_seconds", "gauge", "Seconds since the node started."),
)


def unknown_names(values: Iterable[str]) -> list[str]:
    """The names that are not in the table. A node's own test holds this to be empty."""
    known = {name for stat in STATS for name in stat.names}
    return sorted(set(values) - known)


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
        self.registry = CollectorRegistry()
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
    return ", ".join((*stat.values, OTHER))


def _family(stat: Stat, values: Mapping[str, float]) -> Metric:
    make = CounterMetricFamily if stat.kind == "counter" else GaugeMetricFamily
    name = f"{PREFIX}{stat.name}"
    if not stat.label:
        return make(name, stat.help, value=values.get(stat.name, 0.0))
    family = make(name, stat.help, labels=[stat.label])
    for value, sent in zip(stat.values, stat.names, strict=True):
        family.add_metric([value], values.get(sent, 0.0))
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
