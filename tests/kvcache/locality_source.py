"""A source with a real publisher and a replay ring, and what it holds in truth."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import groupby

from kvcache.block import BlockHash, NamespaceId, StorageKey, hints
from kvcache.event_ring import Ring, Told
from kvcache.events import Publisher
from kvcache.index import make_index
from kvcache.ledger import Change
from kvcache.locality import TIERS, Applied, LocalityIndex, Located
from kvcache.wire import EventBatch

SPACES = (NamespaceId(b"a" * 16), NamespaceId(b"b" * 16))
BYTES_MAX = 4 << 20
RING_BATCHES = 8

Truth = dict[tuple[NamespaceId, str], set[BlockHash]]


def path(count: int, seed: int = 0) -> list[BlockHash]:
    """The hashes of one prompt, whose blocks follow one another."""
    generator = random.Random(seed)
    return [BlockHash(generator.randbytes(16)) for _ in range(count)]


PREFIX = path(64)


class Source:
    """What it stores and removes is given as positions in ``prompt``."""

    def __init__(self, name: str, incarnation: int = 1, prompt: Sequence[BlockHash] = PREFIX) -> None:
        self.name = name
        self.incarnation = incarnation
        self.held: Truth = {}
        self.publisher = Publisher(name, incarnation)
        self.prompt = prompt
        self._ring = Ring(batches_max=RING_BATCHES)

    @property
    def seq(self) -> int:
        return self.publisher.seq

    def store(self, space: NamespaceId, tier: str, places: Iterable[int]) -> list[EventBatch]:
        """Of these what it does not hold, each piece of the path a change of its own."""
        held = self.held.setdefault((space, tier), set())
        fresh = sorted({place for place in places if self.prompt[place] not in held})
        held.update(self.prompt[place] for place in fresh)
        pieces = groupby(enumerate(fresh), key=lambda each: each[1] - each[0])
        return self._tell(
            [self._change("stored", space, [place for _, place in piece]) for _, piece in pieces], tier
        )

    def remove(self, space: NamespaceId, tier: str, places: Iterable[int]) -> list[EventBatch]:
        held = self.held.setdefault((space, tier), set())
        gone = [place for place in places if self.prompt[place] in held]
        held.difference_update(self.prompt[place] for place in gone)
        return self._tell([self._change("removed", space, gone)] if gone else [], tier)

    def behind(self, seq: int) -> list[EventBatch] | None:
        """What was told behind this batch, and a beat; None where that is not kept any more."""
        kept = self._ring.behind(seq)
        if kept is None:
            return None
        return [*(Told(packed=batch).batch for batch in kept), self.publisher.beat()]

    def answer(self, cursor: tuple[int, int] | None) -> list[EventBatch]:
        """What it sends a follower that asks from there on."""
        replayed = self.behind(cursor[1]) if cursor is not None and cursor[0] == self.incarnation else None
        return list(self.publisher.snapshot()) if replayed is None else replayed

    def _change(self, kind: str, space: NamespaceId, places: Sequence[int]) -> Change:
        keys = tuple(StorageKey(space + self.prompt[place]) for place in places)
        before = self.prompt[places[0] - 1] if kind == "stored" and places[0] else None
        parent = StorageKey(space + before) if before is not None else None
        return Change(kind, keys, parent, "")  # type: ignore[arg-type]

    def _tell(self, changes: Sequence[Change], tier: str) -> list[EventBatch]:
        batches = self.publisher.publish(changes, tier) if changes else []
        for batch in batches:
            self._ring.add(batch.seq, Told(batch).packed)
        return batches


def expected(name: str, held: Truth, space: NamespaceId, prefix: Sequence[BlockHash]) -> Located:
    """By the book: block after block until none of the tiers has it."""
    blocks = 0
    tiers = dict.fromkeys(TIERS, 0)
    for block in prefix:
        having = [tier for tier in TIERS if block in held.get((space, tier), ())]
        if not having:
            break
        blocks += 1
        for tier in having:
            tiers[tier] += 1
    return Located(name, space, blocks, tuple(tiers.values()))


def synced(index: LocalityIndex, source: Source, now_ns: int = 0) -> None:
    """By a snapshot, whatever was there before."""
    index.suspect(source.name)
    for batch in source.publisher.snapshot():
        assert index.apply(batch, now_ns) is Applied.TAKEN


def blocks(index: LocalityIndex, prefix: Sequence[BlockHash] = PREFIX) -> dict[tuple[str, bytes], int]:
    return {(each.source, each.namespace): each.blocks for each in index.locate(hints(prefix))}


def followed(*sources: Source, bytes_max: int = BYTES_MAX) -> LocalityIndex:
    index = LocalityIndex(bytes_max, make_index)
    for source in sources:
        synced(index, source)
    return index


def tell(index: LocalityIndex, batches: Iterable[EventBatch], now_ns: int = 5) -> list[Applied]:
    results = [index.apply(batch, now_ns) for batch in batches]
    index.check()
    return results


def is_suspect(index: LocalityIndex, source: str) -> bool:
    found = index.as_of(source)
    assert found is not None
    return found.known and not found.synced
