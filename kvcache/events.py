"""What a node tells routers: batches of stored and removed blocks, numbered, and what is there already.

    ledger changes ──publish──► EventBatch seq 1, 2, 3, ...        to every follower
                    snapshot ─► EventBatch seq 3, 3, 3, left 2, 1, 0   to a new one, before seq 4

One ``Publisher`` a source. ``seq`` grows by one a batch, so that a follower sees a lost one; a higher
``incarnation`` is the source started anew; the digest of each tier lets it see any other difference. A
follower that lost something asks for everything anew: there is no replay. The snapshot is built from
what was published, so it can never say anything else than the batches did.

Invariants (``check``): the digests are those of what is held; every batch fits in one frame.

The sum: 1 to 2 us a block published, 100 bytes kept a block; a snapshot is 8 bytes a block and
100 a run, so a million blocks are 8 MB.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

from kvcache.block import HASH_BYTES, HINT_BYTES, NamespaceId, StorageKey, split_hints
from kvcache.ledger import Change
from kvcache.namespace import Namespace
from kvcache.wire import BODY_BYTES_MAX, BlockEvent, EventBatch

TIER_HOST = "host"
TIER_NVME = "nvme"
RUN_BLOCKS_MAX = 16_384
BATCH_EVENTS_MAX = 8_192
BATCH_BYTES_MAX = BODY_BYTES_MAX // 4
NAMESPACES_A_BATCH_MAX = 64
EVENT_OVERHEAD_BYTES = 160  # 118 measured; the names of kinds and tiers are short.

_DIGEST = struct.Struct("<QQQ")
_MASK = (1 << 64) - 1
_NOTHING: Portion = ([], [])

NamespaceMap = dict[str, str | int]
Portion = tuple[list[NamespaceMap], list[BlockEvent]]
Held = dict[str, dict[NamespaceId, dict[bytes, bytes]]]


class Digest:
    """Of a set of blocks: count, xor of ``hint ^ salt`` and sum of ``hint + salt``, the salt from the
    namespace. So it is folded from the digests of the namespaces. It finds what was lost on the way, not
    what somebody forged."""

    __slots__ = ("count", "sum", "xor")

    def __init__(self) -> None:
        self.count = self.xor = self.sum = 0

    def add(self, namespace: NamespaceId, blocks: Iterable[bytes]) -> None:
        """REQUIRES: none of these hints is in the set."""
        salt = _number(namespace)
        for name in map(_number, blocks):
            self.count += 1
            self.xor ^= name ^ salt
            self.sum += name + salt

    def remove(self, namespace: NamespaceId, blocks: Iterable[bytes]) -> None:
        """REQUIRES: all of these hints are in the set."""
        salt = _number(namespace)
        for name in map(_number, blocks):
            self.count -= 1
            self.xor ^= name ^ salt
            self.sum -= name + salt

    def pack(self) -> bytes:
        """As it travels in ``EventBatch.digests``."""
        return _DIGEST.pack(self.count, self.xor, self.sum & _MASK)


EMPTY_DIGEST = Digest().pack()


class Publisher:
    """The events of one source. One owner; every call returns at once."""

    def __init__(self, source: str, incarnation: int) -> None:
        self._source = source
        self._incarnation = incarnation
        self._seq = 0
        self._held: Held = {}  # The value is the block before, empty for a first one.
        self._digests: dict[str, Digest] = {}
        self._namespaces: list[Namespace] = []
        self._told = 0

    def announce(self, namespace: Namespace) -> None:
        """Tell what this namespace is, before the next events. To be called once, before its first block."""
        self._namespaces.append(namespace)

    def publish(self, changes: Sequence[Change], tier: str = TIER_HOST) -> list[EventBatch]:
        """The batches that tell these changes of a tier's ledger: one, unless there are very many,
        and one before them for namespaces that are new."""
        fresh, self._told = self._namespaces[self._told :], len(self._namespaces)
        return [self._next(*part) for part in _portions(fresh, _events(changes, tier))]

    def snapshot(self) -> Iterator[EventBatch]:
        """Everything that is stored now, parents before children, in batches; at least one.

        It is as of this call, however late it is read."""
        portions = list(_portions(self._namespaces, self._everything())) or [_NOTHING]
        digests = self._packed()
        batches = [
            EventBatch(
                self._source, self._incarnation, self._seq, True, events, len(portions) - at, names, digests
            )
            for at, (names, events) in enumerate(portions, 1)
        ]
        return iter(batches)

    def check(self) -> None:
        """Assert every invariant. Takes time in proportion to what is held."""
        for tier, spaces in self._held.items():
            expected = Digest()
            for namespace, blocks in spaces.items():
                expected.add(namespace, blocks)
            assert expected.pack() == self._digests[tier].pack()

    def _next(self, names: list[NamespaceMap], events: list[BlockEvent]) -> EventBatch:
        for event in events:
            self._follow(event)
        self._seq += 1
        return EventBatch(self._source, self._incarnation, self._seq, False, events, 0, names, self._packed())

    def _follow(self, event: BlockEvent) -> None:
        namespace = NamespaceId(event.namespace)
        blocks = split_hints(event.hashes)
        held = self._held.setdefault(event.tier, {}).setdefault(namespace, {})
        digest = self._digests.setdefault(event.tier, Digest())
        if event.kind == "stored":
            parent = event.parent
            for block in blocks:
                assert block not in held, "stored twice"
                held[block] = parent
                parent = block
            digest.add(namespace, blocks)
        else:
            digest.remove(namespace, blocks)
            for block in blocks:
                del held[block]

    def _everything(self) -> Iterator[BlockEvent]:
        for tier, spaces in self._held.items():
            for namespace, held in spaces.items():
                for run in _runs(held):
                    yield BlockEvent("stored", namespace, tier, held[run[0]], b"".join(run))

    def _packed(self) -> dict[str, bytes]:
        return {tier: digest.pack() for tier, digest in self._digests.items()}


def _number(name: bytes) -> int:
    return int.from_bytes(name[:HINT_BYTES], "little")


def _runs(held: Mapping[bytes, bytes]) -> Iterator[list[bytes]]:
    """Paths that together are all of ``held``, as they lie in it: what was stored first comes first."""
    run: list[bytes] = []
    for block, parent in held.items():
        if run and (parent != run[-1] or len(run) == RUN_BLOCKS_MAX):
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _events(changes: Iterable[Change], tier: str) -> Iterator[BlockEvent]:
    for change in changes:
        before = change.parent[HASH_BYTES:][:HINT_BYTES] if change.parent is not None else b""
        for namespace, blocks in _by_namespace(change.keys).items():
            for at in range(0, len(blocks), RUN_BLOCKS_MAX):
                part = blocks[at : at + RUN_BLOCKS_MAX]
                parent = b"" if change.kind == "removed" else blocks[at - 1] if at else before
                yield BlockEvent(change.kind, namespace, tier, parent, b"".join(part))


def _by_namespace(keys: Iterable[StorageKey]) -> dict[NamespaceId, list[bytes]]:
    """What is stored is one path in one namespace, but what goes at once may be of several."""
    spaces: dict[NamespaceId, list[bytes]] = {}
    for key in keys:
        spaces.setdefault(NamespaceId(key[:HASH_BYTES]), []).append(key[HASH_BYTES:][:HINT_BYTES])
    return spaces


def _portions(namespaces: Sequence[Namespace], events: Iterable[BlockEvent]) -> Iterator[Portion]:
    """What goes into each batch: all namespaces before any event. Nothing for nothing."""
    step = NAMESPACES_A_BATCH_MAX
    for at in range(0, len(namespaces), step):
        yield [namespace.to_map() for namespace in namespaces[at : at + step]], []
    yield from (([], batch) for batch in _batches(events))


def _batches(events: Iterable[BlockEvent]) -> Iterator[list[BlockEvent]]:
    """In order, as many together as one frame surely takes."""
    batch: list[BlockEvent] = []
    size = 0
    for event in events:
        event_bytes = EVENT_OVERHEAD_BYTES + len(event.hashes)
        if batch and (len(batch) == BATCH_EVENTS_MAX or size + event_bytes > BATCH_BYTES_MAX):
            yield batch
            batch, size = [], 0
        batch.append(event)
        size += event_bytes
    if batch:
        yield batch
