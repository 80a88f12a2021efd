"""Messages by which a source tells what it holds: ``Watch``, and its answers (``kvcache.events`` makes them).

A block is named by its routing hint (``block.routing_hint``): 8 bytes, little-endian."""

from __future__ import annotations

import msgspec

from kvcache.wire_base import Message, Unsigned


class Watch(Message, frozen=True, tag="watch"):
    """Send the current content as events, then every event as it happens (roles router, operator, peer). Who
    has everything up to batch ``seq`` of ``incarnation`` is sent what came behind it, while it is still kept."""

    incarnation: Unsigned = 0
    seq: Unsigned = 0


class BlockEvent(Message, frozen=True, tag="block_event"):
    """One change: ``kind`` is stored, removed or cleared. ``hashes`` are joined; ``parent`` (stored only)
    is the hash before the first, empty for the root. ``tier`` is hbm, host or nvme. ``runs``: how many blocks
    that follow one another each run in ``hashes`` has (u16, joined); empty: they are one run."""

    kind: str
    namespace: bytes
    tier: str
    parent: bytes = b""
    hashes: bytes = b""
    runs: bytes = b""


class EventBatch(Message, frozen=True, tag="event_batch"):
    """Events of one source; ``seq`` grows by one a batch. ``snapshot`` marks what was there already,
    at that ``seq``; ``left`` batches of it follow. ``namespaces`` are told, by all their fields, before
    their first event. ``digests``: what each tier holds afterwards (``events.Digest``), if all is told.

    A ``beat`` has no events, and the ``seq`` of the batch before it: the source lives, and told no more.
    ``load`` is how busy the source is, in plain numbers. A ``partial`` source cannot tell all that it holds."""

    source: str
    incarnation: Unsigned
    seq: Unsigned
    snapshot: bool
    events: list[BlockEvent]
    left: Unsigned = 0
    namespaces: list[dict[str, str | int]] = msgspec.field(default_factory=list)
    digests: dict[str, bytes] = msgspec.field(default_factory=dict)
    beat: bool = False
    load: dict[str, float] = msgspec.field(default_factory=dict)
    partial: bool = False
