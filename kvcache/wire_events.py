"""Messages by which a source tells what it holds: ``Watch``, and its answers (``kvcache.events`` makes them).

A block is named by its routing hint (``block.routing_hint``): 8 bytes, little-endian. docs/events.md says all
of it byte by byte."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvcache.packing import PREFIX_BLOCKS_MAX, TEXT_CHARS_MAX
from kvcache.wire_base import Message, Unsigned

BEAT_NS = 1_000_000_000
"""A source that lives says so this often."""

# What a batch can cost who reads it is bounded by its types: it is decoded straight into them.
_Text = Annotated[str, msgspec.Meta(max_length=TEXT_CHARS_MAX)]
_Many = msgspec.Meta(max_length=PREFIX_BLOCKS_MAX)
_Few = msgspec.Meta(max_length=TEXT_CHARS_MAX)

_LENGTH_BYTES = 2
_HINT_BYTES = 8


class Watch(Message, frozen=True, tag="watch"):
    """Send the current content as events, then every event as it happens (roles router, operator, peer).
    Who has everything up to batch ``seq`` of ``incarnation`` is sent what came behind it and a beat, if that
    is still kept."""

    incarnation: Unsigned = 0
    seq: Unsigned = 0


class BlockEvent(Message, frozen=True, tag="block_event"):
    """One change: ``kind`` is stored, removed or cleared. ``hashes`` are joined; ``parent`` (stored only)
    is the hash before the first, empty for the root and where it is not known. ``tier`` is hbm, host or nvme.
    ``runs`` (stored only): how many blocks that follow one another each run in ``hashes`` has (u16, joined);
    all behind the last are as long as the last. Empty: they are one run."""

    kind: _Text
    namespace: bytes
    tier: _Text
    parent: bytes = b""
    hashes: bytes = b""
    runs: bytes = b""


class EventBatch(Message, frozen=True, tag="event_batch"):
    """Events of one source; ``seq`` grows by one a batch. ``snapshot`` marks what was there already,
    at that ``seq``; ``left`` batches of it follow. ``namespaces`` are told, by all their fields, before
    their first event. ``digests``: what each tier holds afterwards (``events.Digest``), where it is said.

    A ``beat`` has no events, and the ``seq`` of the batch before it: the source lives, and told no more.
    ``load`` is how busy the source is, in plain numbers (``kvcache.event_load``). A ``partial`` source cannot
    tell all that it holds."""

    source: _Text
    incarnation: Unsigned
    seq: Unsigned
    snapshot: bool
    events: Annotated[list[BlockEvent], _Many]
    left: Unsigned = 0
    namespaces: Annotated[list[dict[str, str | int]], _Few] = msgspec.field(default_factory=list)
    digests: Annotated[dict[str, bytes], _Few] = msgspec.field(default_factory=dict)
    beat: bool = False
    load: Annotated[dict[str, float], _Few] = msgspec.field(default_factory=dict)
    partial: bool = False


def run_lengths(event: BlockEvent) -> bytes:
    """The length of each of its runs (u16, little-endian, joined), for ``Index.store_runs``. REQUIRES: it has
    ``runs``. Their sum is that of its blocks, or the event makes no sense."""
    last = int.from_bytes(event.runs[-_LENGTH_BYTES:], "little")
    told = sum(memoryview(event.runs).cast("H")) if len(event.runs) % _LENGTH_BYTES == 0 else 0
    more = len(event.hashes) // _HINT_BYTES - told
    if last == 0 or more <= 0:
        return event.runs
    return event.runs + event.runs[-_LENGTH_BYTES:] * (more // last)
