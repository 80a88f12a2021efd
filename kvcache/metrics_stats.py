"""The table of the node's stats: every name that ``StatsReply.values`` can have.

``kvcache.metrics`` makes a Prometheus metric of each. A stat with a label is sent as ``name:value``
(``requests:lease``); its values are a closed set, or named by the operator in the node's settings, so that no
tenant, key or prompt can become a label and the number of series is bounded.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass

from kvcache.errors import CODES
from kvcache.wire import Request

PREFIX = "kvcache_"
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
    node lives. With ``label``, one number for each of ``values`` (and for ``other``); without ``values``,
    for each that the node's settings name."""

    name: str
    kind: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"

    @property
    def is_open(self) -> bool:
        """Does the node's operator name the values?"""
        return bool(self.label) and not self.values

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
        "hit_tokens",
        "counter",
        "Tokens of the blocks that leases gave, once for all who share one: prefill not to be computed.",
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
    # What is in HBM, and what went on there.
    Stat("hbm_hit_blocks", "counter", "Blocks that leases gave in HBM, counted as hit_tokens are."),
    Stat("hbm_saved_blocks", "counter", "Blocks published in HBM."),
    Stat("hbm_promoted_blocks", "counter", "Those of them that a tier below held, the same bytes."),
    Stat(
        "hbm_demoted_blocks", "counter", "Blocks copied from HBM into host memory before they left, verified."
    ),
    Stat("hbm_demoted_bytes", "counter", "Their bytes."),
    Stat("hbm_dropped_blocks", "counter", "Blocks evicted from HBM that no tier below held."),
    Stat(
        "hbm_removed_blocks",
        "counter",
        "Blocks unpublished in HBM, by reason; fenced: the GPU was lost.",
        "reason",
        ("evicted", "fenced", "orphaned", "quarantined", "reclaimed"),
    ),
    Stat(
        "hbm_skipped_blocks",
        "counter",
        "Blocks not copied into host memory, by reason.",
        "reason",
        ("busy", "error", "full", "gone", "parent"),
    ),
    Stat(
        "hbm_rejected_blocks",
        "counter",
        "Blocks in HBM whose bytes were wrong (checksum, reader), or not those that the tiers below have "
        "(differs) or were given later (overruled).",
        "reason",
        ("checksum", "reader", "differs", "overruled"),
    ),
    Stat("hbm_refused_maps", "counter", "Engines that asked for HBM where there is none for them."),
    Stat("hbm_leases", "gauge", "Leases held in HBM now."),
    Stat("hbm_reservations", "gauge", "Reservations open in HBM now."),
    Stat("hbm_limbo_blocks", "gauge", "Slots of HBM whose writer vanished, until it is known to have ended."),
    Stat("hbm_lost", "gauge", "GPUs whose memory was lost since the start."),
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
    Stat("shadow_hit_ratio", "gauge", "What shadow caches would have found lately, by policy@size.", "cache"),
    Stat("shadow_sample", "gauge", "Share of the blocks that shadow caches see; 0: there are none."),
    Stat("shadow_blocks", "gauge", "Blocks that all shadow caches know of."),
    Stat("shadow_seconds", "counter", "Seconds that shadow caches took of the node's processor."),
    Stat("shadow_dropped", "counter", "Look-ups and saves that shadow caches did not see, for want of time."),
    Stat("namespaces", "gauge", "Namespaces opened since the start."),
    Stat("arenas", "gauge", "Trust domains with memory of their own."),
    Stat("pins", "gauge", "Connections whose processes have host memory registered with their GPUs."),
    Stat("ended_pins", "counter", "Such connections ended by the node, as memory had to go to others."),
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
