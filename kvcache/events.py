"""What a node tells routers: batches of stored and removed blocks, numbered, and what is there already.

    ledger changes ──publish──► EventBatch seq 1, 2, 3, ...            to every follower
                       beat ──► EventBatch seq 3, nothing in it        every second
                   snapshot ──► EventBatch seq 3, 3, 3, left 2, 1, 0   to a new one, before seq 4

One ``Publisher`` a source. ``seq`` grows by one a batch, so that a follower sees a lost one; a higher
``incarnation`` is the source started anew; the digest of each tier, told with every eighth batch, every beat
and every snapshot, lets it see any other difference. What is told is kept in an index like a follower's
(``kvcache.index``), a holder a namespace, so a snapshot can never say anything else than the batches did.
Two blocks of one namespace whose hints are equal are one block here and at every follower.

Invariants (``check``): the digests are those of what is held; every batch fits in one frame.

The sum: 0.2 us a block published in runs of 64, 25 bytes kept a block.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from kvcache.block import HASH_BYTES, HINT_BYTES, KEY_BYTES, NamespaceId, StorageKey
from kvcache.event_pages import NAMESPACES_A_PAGE_MAX, NamespaceMap, Part, Snapshot
from kvcache.index import make_index
from kvcache.ledger import Change
from kvcache.namespace import Namespace
from kvcache.wire import BODY_BYTES_MAX, BlockEvent, EventBatch

TIER_HBM, TIER_HOST, TIER_NVME = TIERS = ("hbm", "host", "nvme")
DIGEST_EVERY = 8
RUN_BLOCKS_MAX = 16_384
BATCH_EVENTS_MAX = 8_192
BATCH_BYTES_MAX = BODY_BYTES_MAX // 4
EVENT_OVERHEAD_BYTES = 160  # 118 measured; the names of kinds and tiers are short.

_INDEX_BYTES_MAX = 1 << 40  # It holds what the node's tiers hold, and they are bounded.
_NUMBERS = {tier: number for number, tier in enumerate(TIERS)}
_DIGEST = struct.Struct("<QQQ")
_MASK = (1 << 64) - 1
_KEY_WORDS = KEY_BYTES // HINT_BYTES
_HINT_WORD = HASH_BYTES // HINT_BYTES
_EMPTY = (0, 0, 0)

Portion = tuple[list[NamespaceMap], list[BlockEvent]]
Sums = tuple[int, int, int]


class Digest:
    """Of a set of blocks: count, xor of ``hint ^ salt`` and sum of ``hint + salt``, the salt from the
    namespace. So it is folded from the digests of the namespaces. It finds what was lost on the way, not
    what somebody forged."""

    __slots__ = ("count", "sum", "xor")

    def __init__(self) -> None:
        self.count = self.xor = self.sum = 0

    def add(self, namespace: NamespaceId, blocks: Iterable[bytes]) -> None:
        """REQUIRES: none of these hints is in the set."""
        for hint in map(_number, blocks):
            self.join(namespace, (1, hint, hint))

    def remove(self, namespace: NamespaceId, blocks: Iterable[bytes]) -> None:
        """REQUIRES: all of these hints are in the set."""
        for hint in map(_number, blocks):
            self.part(namespace, (1, hint, hint))

    def join(self, namespace: NamespaceId, sums: Sums) -> None:
        """Add what has these sums (``Index.digest``: count, xor, sum of the hints). REQUIRES: as ``add``."""
        self._fold(namespace, sums, 1)

    def part(self, namespace: NamespaceId, sums: Sums) -> None:
        """Remove what has these sums. REQUIRES: as ``remove``."""
        self._fold(namespace, sums, -1)

    def pack(self) -> bytes:
        """As it travels in ``EventBatch.digests``."""
        return _DIGEST.pack(self.count, self.xor, self.sum & _MASK)

    def _fold(self, namespace: NamespaceId, sums: Sums, sign: int) -> None:
        count, joined_xor, total = sums
        salt = _number(namespace)
        self.count += sign * count
        self.xor ^= joined_xor ^ (salt if count % 2 else 0)
        self.sum += sign * (total + count * salt)


EMPTY_DIGEST = Digest().pack()


@dataclass(slots=True)
class _Space:
    """One namespace in the index. ``sums``: by tier, what the source's digest counts of it."""

    namespace: NamespaceId
    holder: int
    sums: list[Sums] = field(default_factory=lambda: [_EMPTY] * len(TIERS))


class Publisher:
    """The events of one source. One owner; every call returns at once."""

    def __init__(self, source: str, incarnation: int) -> None:
        self.source = source
        self.incarnation = incarnation
        self.seq = 0
        """Of the newest batch."""
        self._index = make_index(_INDEX_BYTES_MAX)
        self._spaces: dict[NamespaceId, _Space] = {}
        self._digests = {TIER_HOST: Digest()}
        self._changed: set[tuple[NamespaceId, str]] = set()  # What ``_digests`` do not count yet.
        self._namespaces: list[Namespace] = []
        self._told = 0

    @property
    def kept_bytes(self) -> int:
        """What is taken to keep what was told."""
        return self._index.bytes

    def announce(self, namespace: Namespace) -> None:
        """Tell what this namespace is, before the next events. To be called once, before its first block."""
        self._namespaces.append(namespace)

    def publish(self, changes: Sequence[Change], tier: str = TIER_HOST) -> list[EventBatch]:
        """The batches that tell these changes of a tier's ledger: one, unless there are very many,
        and one before them for namespaces that are new."""
        fresh, self._told = self._namespaces[self._told :], len(self._namespaces)
        return [self._next(*part) for part in _portions(fresh, _events(changes, tier))]

    def beat(self, load: dict[str, float] | None = None) -> EventBatch:
        """Says that the source lives, what it told last, and how busy it is."""
        digests = self._packed()
        return EventBatch(
            self.source, self.incarnation, self.seq, False, [], digests=digests, beat=True, load=load or {}
        )

    def capture(self) -> Snapshot:
        """Everything that is stored now. Takes 1 to 4 ms for a million blocks in runs of 64 to 8."""
        names = [namespace.to_map() for namespace in self._namespaces]
        digests = self._packed()
        parts = [
            Part(space.namespace, tier, *self._index.runs(space.holder, _NUMBERS[tier]))
            for space in self._spaces.values()
            for tier in self._digests
            if space.sums[_NUMBERS[tier]] != _EMPTY
        ]
        return Snapshot(self.source, self.incarnation, self.seq, names, parts, digests)

    def snapshot(self) -> Iterator[EventBatch]:
        """The pages of ``capture``, as of this call, however late they are read; at least one."""
        return self.capture().pages()

    def check(self) -> None:
        """Assert every invariant. Takes time in proportion to what is held."""
        self._index.check()
        told = self._packed()
        for tier, digest in told.items():
            expected = Digest()
            for space in self._spaces.values():
                held = self._index.held(space.holder, _NUMBERS[tier]).tobytes()
                blocks = (held[at : at + HINT_BYTES] for at in range(0, len(held), HINT_BYTES))
                expected.add(space.namespace, blocks)
            assert expected.pack() == digest

    def _next(self, names: list[NamespaceMap], events: list[BlockEvent]) -> EventBatch:
        for event in events:
            self._follow(event)
        self.seq += 1
        digests = {} if self.seq % DIGEST_EVERY else self._packed()
        return EventBatch(self.source, self.incarnation, self.seq, False, events, 0, names, digests)

    def _follow(self, event: BlockEvent) -> None:
        namespace = NamespaceId(event.namespace)
        holder, tier = self._space(namespace).holder, _NUMBERS[event.tier]
        if event.kind == "stored":
            parent = _number(event.parent) if event.parent else None
            refused = self._index.store(holder, tier, event.hashes, parent)
            assert not refused, "the index is larger than any node"
        else:
            self._index.remove(holder, tier, event.hashes)
        self._changed.add((namespace, event.tier))

    def _space(self, namespace: NamespaceId) -> _Space:
        space = self._spaces.get(namespace)
        if space is None:
            number = len(self._spaces)
            space = self._spaces[namespace] = _Space(namespace, self._index.open(number))
        return space

    def _packed(self) -> dict[str, bytes]:
        for namespace, tier in self._changed:
            space, number = self._spaces[namespace], _NUMBERS[tier]
            digest = self._digests.setdefault(tier, Digest())
            digest.part(namespace, space.sums[number])
            space.sums[number] = self._index.digest(space.holder, number)
            digest.join(namespace, space.sums[number])
        self._changed.clear()
        return {tier: digest.pack() for tier, digest in self._digests.items()}


def _number(name: bytes) -> int:
    return int.from_bytes(name[:HINT_BYTES], "little")


def _events(changes: Iterable[Change], tier: str) -> Iterator[BlockEvent]:
    for change in changes:
        before = change.parent[HASH_BYTES:][:HINT_BYTES] if change.parent is not None else b""
        for namespace, keys in _by_namespace(change).items():
            hashes = _hints(keys)
            step = RUN_BLOCKS_MAX * HINT_BYTES
            for at in range(0, len(hashes), step):
                parent = b"" if change.kind == "removed" else hashes[at - HINT_BYTES : at] if at else before
                yield BlockEvent(change.kind, namespace, tier, parent, hashes[at : at + step])


def _by_namespace(change: Change) -> dict[NamespaceId, Sequence[StorageKey]]:
    """What is stored is one path in one namespace, but what goes at once may be of several."""
    if not change.keys:
        return {}
    first = NamespaceId(change.keys[0][:HASH_BYTES])
    if change.kind == "stored" or all(key.startswith(first) for key in change.keys):
        return {first: change.keys}
    spaces: dict[NamespaceId, list[StorageKey]] = {}
    for key in change.keys:
        spaces.setdefault(NamespaceId(key[:HASH_BYTES]), []).append(key)
    return dict(spaces)


def _hints(keys: Sequence[StorageKey]) -> bytes:
    """As ``block.hints`` of their hashes, at half the time."""
    return memoryview(b"".join(keys)).cast("Q")[_HINT_WORD::_KEY_WORDS].tobytes()


def _portions(namespaces: Sequence[Namespace], events: Iterable[BlockEvent]) -> Iterator[Portion]:
    """What goes into each batch: all namespaces before any event. Nothing for nothing."""
    step = NAMESPACES_A_PAGE_MAX
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
