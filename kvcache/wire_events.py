"""Messages by which a node tells what it holds: the answers to ``Watch`` (``kvcache.events`` makes them)."""

from __future__ import annotations

import msgspec

from kvcache.wire_base import Message, Unsigned


class BlockEvent(Message, frozen=True, tag="block_event"):
    """One change: ``kind`` is stored, removed or cleared. ``hashes`` are joined; ``parent`` (stored only)
    is the hash before the first, empty for the root. ``tier`` is hbm, host or nvme."""

    kind: str
    namespace: bytes
    tier: str
    parent: bytes = b""
    hashes: bytes = b""


class EventBatch(Message, frozen=True, tag="event_batch"):
    """Events of one source; ``seq`` grows by one a batch. ``snapshot`` marks what was there already,
    at that ``seq``; ``left`` batches of it follow. ``namespaces`` are told, by all their fields, before
    their first event. ``digests``: what each tier holds afterwards (``events.Digest``), if all is told."""

    source: str
    incarnation: Unsigned
    seq: Unsigned
    snapshot: bool
    events: list[BlockEvent]
    left: Unsigned = 0
    namespaces: list[dict[str, str | int]] = msgspec.field(default_factory=list)
    digests: dict[str, bytes] = msgspec.field(default_factory=dict)
