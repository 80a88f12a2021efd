"""What a node tells routers: batches of stored and removed blocks, numbered, and what is there already.

One ``Publisher`` a source. ``seq`` grows by one a batch, so that a follower sees a lost one; a higher
``incarnation`` is the source started anew. The snapshot is built from what was published, so it can
never say anything else than the batches did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvcache.block import HASH_BYTES, StorageKey
from kvcache.ledger import Change
from kvcache.wire import BlockEvent, EventBatch

TIER = "host"
SNAPSHOT_BLOCKS_MAX = 65_536


class Publisher:
    """The events of one source. One owner; every call returns at once."""

    def __init__(self, source: str, incarnation: int) -> None:
        self._source = source
        self._incarnation = incarnation
        self._seq = 0
        self._parents: dict[StorageKey, StorageKey | None] = {}

    def publish(self, changes: Sequence[Change]) -> EventBatch:
        """The batch that tells these changes of the ledger."""
        for change in changes:
            self._follow(change)
        self._seq += 1
        return self._batch([event for change in changes for event in _events(change)], False)

    def snapshot(self) -> Iterator[EventBatch]:
        """Everything that is stored now, parents before children, in batches; at least one."""
        events: list[BlockEvent] = []
        for count, (key, parent) in enumerate(self._parents.items(), 1):
            events.append(_event("stored", (key,), parent))
            if count % SNAPSHOT_BLOCKS_MAX == 0:
                yield self._batch(events, True)
                events = []
        yield self._batch(events, True)

    def _follow(self, change: Change) -> None:
        parent = change.parent
        for key in change.keys:
            if change.kind == "stored":
                self._parents[key] = parent
                parent = key
            else:
                del self._parents[key]

    def _batch(self, events: list[BlockEvent], snapshot: bool) -> EventBatch:
        return EventBatch(self._source, self._incarnation, self._seq, snapshot, events)


def _events(change: Change) -> list[BlockEvent]:
    """One event a namespace: what is stored is one path, but what goes at once may be of several."""
    spaces: dict[bytes, list[StorageKey]] = {}
    for key in change.keys:
        spaces.setdefault(key[:HASH_BYTES], []).append(key)
    return [_event(change.kind, keys, change.parent) for keys in spaces.values()]


def _event(kind: str, keys: Sequence[StorageKey], parent: StorageKey | None) -> BlockEvent:
    """REQUIRES: all keys are of one namespace."""
    return BlockEvent(
        kind=kind,
        namespace=keys[0][:HASH_BYTES],
        tier=TIER,
        parent=parent[HASH_BYTES:] if parent else b"",
        hashes=b"".join([key[HASH_BYTES:] for key in keys]),
    )
