"""Telling followers what this node holds: every batch to all of them, to a new one what it has missed.

    publish ──► batch ──► ring ──► every follower
    watch(cursor) ──► the batches behind it, and a beat   while the ring has them
                 └──► a snapshot, and what came behind it  otherwise

A follower is entered in the same step in which its answer is fixed, so that nothing is told twice or not at
all. Followers that come while another still takes its snapshot are given the same one.

The sum: a batch is packed once, 3 us, and framed for each follower, 1 us; a follower costs no memory here but
what it has not taken yet, a snapshot 8 to 10 bytes a block while it is being taken.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvcache.event_pages import Snapshot
from kvcache.event_ring import Ring, Told
from kvcache.events import Publisher
from kvcache.ledger import Change
from kvcache.namespace import Namespace
from kvcache.wire_events import BEAT_NS

Watcher = Callable[[Told], None]


class Telling:
    """One owner; every call returns at once."""

    def __init__(self, publisher: Publisher, load: Callable[[], dict[str, float]]) -> None:
        """``load`` says how busy the node is (``kvcache.event_load``)."""
        self._publisher = publisher
        self._load = load
        self._ring = Ring()
        self._watchers: dict[int, Watcher] = {}
        self._snapshot: weakref.ref[Snapshot] | None = None
        self._beat_ns = 0
        self._replays = self._snapshots = 0

    def stats(self) -> dict[str, float]:
        return {
            "watchers": float(len(self._watchers)),
            "watches:replay": float(self._replays),
            "watches:snapshot": float(self._snapshots),
            "events_ring_bytes": float(self._ring.bytes),
            "events_kept_bytes": float(self._publisher.kept_bytes),
        }

    def announce(self, namespace: Namespace) -> None:
        """As ``Publisher.announce``."""
        self._publisher.announce(namespace)

    def publish(self, changes: Sequence[Change], tier: str) -> int:
        """Tell all followers these changes. Returns in how many batches."""
        batches = self._publisher.publish(changes, tier)
        for batch in batches:
            told = Told(batch)
            self._ring.add(batch.seq, told.packed)
            self._send(told)
        return len(batches)

    def beat(self, now_ns: int) -> None:
        """Called more often than every ``BEAT_NS``: so often all followers are told that the node lives."""
        if now_ns >= self._beat_ns:
            due_ns = self._beat_ns + BEAT_NS
            self._beat_ns = due_ns if due_ns > now_ns else now_ns + BEAT_NS
            if self._watchers:
                self._send(Told(self._publisher.beat(self._load())))

    def watch(self, owner: int, watcher: Watcher, incarnation: int, seq: int) -> Iterable[Told]:
        """From now on ``watcher`` gets everything; what is returned comes before it. ``incarnation`` and
        ``seq`` are what the follower has."""
        self._watchers[owner] = watcher
        missed = self._ring.behind(seq) if incarnation == self._publisher.incarnation else None
        if missed is not None:
            self._replays += 1
            return itertools.chain(_read(missed), [Told(self._publisher.beat(self._load()))])
        self._snapshots += 1
        snapshot = self._snapshot() if self._snapshot is not None else None
        behind = self._ring.behind(snapshot.seq) if snapshot is not None else None
        if snapshot is None or behind is None:
            snapshot, behind = self._publisher.capture(), []
            self._snapshot = weakref.ref(snapshot)
        return itertools.chain(map(Told, snapshot.pages()), _read(behind))

    def unwatch(self, owner: int) -> None:
        self._watchers.pop(owner, None)

    def check(self) -> None:
        """Assert every invariant. Takes time in proportion to what is held."""
        self._publisher.check()
        self._ring.check()

    def _send(self, told: Told) -> None:
        for watcher in list(self._watchers.values()):
            watcher(told)


def _read(batches: Iterable[bytes]) -> Iterator[Told]:
    return (Told(packed=batch) for batch in batches)
