"""The locality index: which source holds how much of a prefix, and in which tier. The pure-Python one,
and the oracle of any other.

A source's batches come in order, or the index notices:

    unknown ──snapshot, whole──► synced ──batch in order──► synced
                                    │ batch lost, or its digest differs, or ``suspect`` was called
                                    ▼
                                 suspect: serves what it last knew, takes nothing but a snapshot
    any ──batch of a higher incarnation──► unknown: what was there is forgotten at once

A block's hash covers all before it, so the index needs no tree: a set of hashes a shard, and the leading
run is found by looking each hash up. So holes, refills and children that come before their parents
cannot make it wrong. A *shard* is a source's blocks of one namespace: ranks share prefix hashes, and
have a shard each. A snapshot is loaded beside what is there and replaces it when it is whole.

Memory is bounded by ``entries_max`` blocks, a snapshot being loaded included. Over that, a source's new
blocks are refused and counted, and the source is marked *partial*: what is said of it is then too
little, never too much.

Invariants (``check``): ``entries`` counts what is held; a source that is synced and not partial has the
digests that its last batch told; no shard holds a block in no tier.

The sum: 1 to 2 us a block applied, 100 bytes a block held, 0.2 us a leading block and shard looked up.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from kvcache.block import HASH_BYTES, HINT_BYTES, BlockHash, NamespaceId, split_hints
from kvcache.errors import BadInput
from kvcache.events import EMPTY_DIGEST, Digest
from kvcache.namespace import Namespace
from kvcache.wire import BlockEvent, EventBatch

TIERS = ("hbm", "host", "nvme")
SHARDS_MAX = 65_536

_BITS = {tier: 1 << at for at, tier in enumerate(TIERS)}
_MASK_COUNT = 1 << len(TIERS)


class Applied(Enum):
    """What became of a batch. After any of ``LOST`` the follower leaves the stream, calls ``suspect``,
    and asks anew for a snapshot, of which it takes every batch from the first."""

    TAKEN = "taken"
    STALE = "stale"  # Of an older incarnation, or told before: ignored.
    GAP = "gap"  # Batches before it were lost: ignored.
    RESTARTED = "restarted"  # The source started anew: all it had is forgotten.
    DRIFT = "drift"  # Taken, but the source holds something else than the index.


LOST = frozenset({Applied.GAP, Applied.RESTARTED, Applied.DRIFT})


@dataclass(frozen=True, slots=True)
class AsOf:
    """How far a source's batches were applied, and when it was last heard of.

    ``known`` is false until it has told everything once: then "nothing" is not an answer."""

    source: str
    incarnation: int
    seq: int
    heard_ns: int
    synced: bool
    known: bool
    partial: bool


@dataclass(frozen=True, slots=True)
class Located:
    """One shard's leading blocks: ``blocks`` in the union of its tiers, up to the first hole, and how
    many of these each of ``TIERS`` has."""

    source: str
    namespace: NamespaceId
    blocks: int
    tiers: tuple[int, ...]


class LocalityIndex:
    """Any number of sources; one owner; every call returns at once. Reads no clock."""

    def __init__(self, entries_max: int) -> None:
        """``entries_max``: the most blocks to hold, a block counted once a shard."""
        assert entries_max > 0
        self.entries_max = entries_max
        self.refused_blocks = 0
        self._sources: dict[str, _Source] = {}
        self._namespaces: dict[NamespaceId, Namespace] = {}

    @property
    def entries(self) -> int:
        return sum(view.entries for source in self._sources.values() for view in source.views())

    def apply(self, batch: EventBatch, now_ns: int) -> Applied:
        """Take one batch. RAISES BadInput, having taken nothing of it, when it makes no sense."""
        _check_meaning(batch)
        names = [Namespace.from_map(fields) for fields in batch.namespaces]
        source = self._sources.get(batch.source)
        if source is None:
            source = self._sources[batch.source] = _Source(batch.source, batch.incarnation)
        self._name(names)
        if batch.incarnation < source.incarnation:
            return Applied.STALE
        restarted = batch.incarnation > source.incarnation
        if restarted:
            source.restart(batch.incarnation)
        if batch.snapshot:
            return self._load(source, batch, now_ns)
        if restarted:
            return Applied.RESTARTED
        return self._advance(source, batch, now_ns)

    def suspect(self, source: str) -> None:
        """The stream of this source broke: what it held is served on, marked, until a snapshot comes."""
        known = self._sources.get(source)
        if known is not None:
            known.synced = False
            known.loading = None

    def heard(self, source: str, now_ns: int) -> None:
        """The source is alive, and everything it told up to ``now_ns`` was applied."""
        known = self._sources.get(source)
        if known is not None and known.synced:
            known.heard_ns = max(known.heard_ns, now_ns)

    def forget(self, source: str) -> None:
        """The source is gone for good."""
        self._sources.pop(source, None)

    def locate(
        self, prefix: Sequence[BlockHash], namespaces: Container[bytes] | None = None
    ) -> list[Located]:
        """What each shard has of ``prefix``, shards with nothing included, by source and namespace.
        With ``namespaces``, only shards of these."""
        return [
            Located(source.name, namespace, *_leading(shard, prefix))
            for source in self._sources.values()
            for namespace, shard in source.view.shards.items()
            if namespaces is None or namespace in namespaces
        ]

    def sources(self) -> list[AsOf]:
        """How current the index is, source by source."""
        return [source.as_of() for source in self._sources.values()]

    def namespace(self, namespace: NamespaceId) -> Namespace | None:
        """All its fields, if a source told them."""
        return self._namespaces.get(namespace)

    def known_namespaces(self) -> list[NamespaceId]:
        return list(self._namespaces)

    def check(self) -> None:
        """Assert every invariant. Takes time in proportion to what is held."""
        assert self.entries <= self.entries_max
        for source in self._sources.values():
            for view in source.views():
                view.check()
            if source.synced and not source.view.partial and source.told:
                assert source.view.agrees(source.told)

    def _name(self, names: Sequence[Namespace]) -> None:
        for namespace in names:
            if len(self._namespaces) < SHARDS_MAX:
                self._namespaces[namespace.namespace_id()] = namespace

    def _advance(self, source: _Source, batch: EventBatch, now_ns: int) -> Applied:
        if batch.seq <= source.seq:
            return Applied.STALE
        if not source.synced or batch.seq != source.seq + 1:
            source.synced = False
            return Applied.GAP
        self._take(source.view, batch.events)
        source.seq, source.heard_ns = batch.seq, now_ns
        return self._agreed(source, batch)

    def _load(self, source: _Source, batch: EventBatch, now_ns: int) -> Applied:
        loading = source.loading or _Loading(batch.seq, batch.left + 1)
        if (loading.seq, loading.left) != (batch.seq, batch.left + 1):
            self.suspect(source.name)
            return Applied.GAP
        source.loading = loading
        loading.left = batch.left
        coming = sum(len(event.hashes) for event in batch.events) // HINT_BYTES
        if self.entries + coming > self.entries_max:
            source.view = _View()  # No room for both: better nothing for a moment than a part for long.
            source.synced = source.known = False
        self._take(loading.view, batch.events)
        if batch.left:
            return Applied.TAKEN
        source.take_over(loading, now_ns)
        return self._agreed(source, batch)

    def _agreed(self, source: _Source, batch: EventBatch) -> Applied:
        source.told = dict(batch.digests)
        if source.view.partial or not batch.digests or source.view.agrees(batch.digests):
            return Applied.TAKEN
        source.synced = False
        return Applied.DRIFT

    def _take(self, view: _View, events: Sequence[BlockEvent]) -> None:
        room = self.entries_max - self.entries
        for event in events:
            before = view.entries
            self.refused_blocks += view.take(event, room)
            room -= view.entries - before


@dataclass(slots=True)
class _View:
    """One source's blocks: by shard, each with the set of its tiers as bits."""

    shards: dict[NamespaceId, dict[bytes, int]] = field(default_factory=dict)
    digests: dict[str, Digest] = field(default_factory=dict)
    entries: int = 0
    partial: bool = False

    def take(self, event: BlockEvent, room: int) -> int:
        """Returns how many blocks were refused because ``room`` more are too many."""
        namespace = NamespaceId(event.namespace)
        if event.kind == "stored":
            return self._store(self.shards.setdefault(namespace, {}), event, room)
        shard = self.shards.get(namespace, {})
        blocks = list(shard) if event.kind == "cleared" else split_hints(event.hashes)
        self._remove(shard, event, blocks)
        return 0

    def _store(self, shard: dict[bytes, int], event: BlockEvent, room: int) -> int:
        bit = _BITS[event.tier]
        fresh: list[bytes] = []
        refused = 0
        for block in split_hints(event.hashes):
            mask = shard.get(block, 0)
            if not mask and room <= 0:
                refused += 1
                continue
            if not mask:
                self.entries += 1
                room -= 1
            if not mask & bit:
                fresh.append(block)
                shard[block] = mask | bit
        self._digest(event.tier).add(NamespaceId(event.namespace), fresh)
        self.partial = self.partial or refused > 0
        return refused

    def _remove(self, shard: dict[bytes, int], event: BlockEvent, blocks: Sequence[bytes]) -> None:
        bit = _BITS[event.tier]
        gone = []
        for block in blocks:
            mask = shard.get(block, 0)
            if mask & bit:
                gone.append(block)
                if mask == bit:
                    del shard[block]
                    self.entries -= 1
                else:
                    shard[block] = mask ^ bit
        self._digest(event.tier).remove(NamespaceId(event.namespace), gone)

    def agrees(self, told: Mapping[str, bytes]) -> bool:
        mine = {tier: digest.pack() for tier, digest in self.digests.items()}
        return all(mine.get(tier, EMPTY_DIGEST) == told.get(tier, EMPTY_DIGEST) for tier in {*mine, *told})

    def check(self) -> None:
        assert self.entries == sum(map(len, self.shards.values()))
        for tier, bit in _BITS.items():
            expected = Digest()
            for namespace, shard in self.shards.items():
                assert all(0 < mask < _MASK_COUNT for mask in shard.values())
                expected.add(namespace, [block for block, mask in shard.items() if mask & bit])
            assert expected.pack() == self._digest(tier).pack()

    def _digest(self, tier: str) -> Digest:
        return self.digests.setdefault(tier, Digest())


@dataclass(slots=True)
class _Loading:
    """A snapshot on its way: ``left`` batches of it are still to come."""

    seq: int
    left: int
    view: _View = field(default_factory=_View)


@dataclass(slots=True)
class _Source:
    name: str
    incarnation: int
    seq: int = 0
    heard_ns: int = 0
    synced: bool = False
    known: bool = False
    view: _View = field(default_factory=_View)
    loading: _Loading | None = None
    told: dict[str, bytes] = field(default_factory=dict)

    def views(self) -> list[_View]:
        return [self.view] if self.loading is None else [self.view, self.loading.view]

    def restart(self, incarnation: int) -> None:
        self.incarnation, self.seq = incarnation, 0
        self.synced = self.known = False
        self.view, self.loading = _View(), None

    def take_over(self, loading: _Loading, now_ns: int) -> None:
        self.view, self.loading = loading.view, None
        self.seq, self.heard_ns = loading.seq, now_ns
        self.synced = self.known = True

    def as_of(self) -> AsOf:
        return AsOf(
            source=self.name,
            incarnation=self.incarnation,
            seq=self.seq,
            heard_ns=self.heard_ns,
            synced=self.synced,
            known=self.known,
            partial=self.view.partial,
        )


def _leading(shard: Mapping[bytes, int], prefix: Sequence[BlockHash]) -> tuple[int, tuple[int, ...]]:
    """How many blocks to the first hole, and how many of these are in each tier."""
    counts = [0] * _MASK_COUNT  # By set of tiers.
    blocks = 0
    for block in prefix:
        mask = shard.get(block[:HINT_BYTES])
        if mask is None:
            break
        counts[mask] += 1
        blocks += 1
    tiers = tuple(sum(count for mask, count in enumerate(counts) if mask & bit) for bit in _BITS.values())
    return blocks, tiers


def _check_meaning(batch: EventBatch) -> None:
    for event in batch.events:
        sizes = (len(event.namespace), len(event.hashes) % HINT_BYTES)
        whole = event.tier in _BITS and sizes == (HASH_BYTES, 0)
        if not (whole and event.kind in ("stored", "removed", "cleared")):
            raise BadInput(
                "bad_message",
                f"an event of kind {event.kind[:20]!r} in tier {event.tier[:20]!r}",
                "it is none that a source tells",
                "run the same release of kvcache on both sides",
            )
