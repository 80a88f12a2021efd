"""The locality index: which source holds how much of a prefix, and in which tier, as of when.

    batches, snapshots, beats ──apply──► source by source, what counts (kvcache.locality_source)
                                            └► the native index, a holder a namespace (kvcache.locality_view)
    choices of a router ───────place──► placements, for a while (kvcache.locality_placed)
    hints of a prompt ─────────match──► columns: source, namespace, blocks, a tier each, placed

A block is its routing hint, 64 bits that stand for all blocks before it too; so holes, refills and children
that come before their parents cannot make the index wrong. A *shard* is a source's blocks of one namespace:
ranks share prefix hashes, and have a shard each.

Memory is bounded by ``bytes_max``, a snapshot being loaded and the placements included. Over that, a source's
new blocks are refused and counted, and the source is marked *partial*: what is said of it is then too
little, never too much. Removals are taken whatever they cost (``kvcache.index``).

**Threads.** Any thread may call anything. Who changes something holds one lock, and placements have another.
Who asks (``match``, ``locate``, ``sources`` and the like, but not ``entries``) takes neither: the native
index has its own; the tables here only grow, or are replaced as a whole; what is said of a source is one
object. An answer names sources and namespaces by numbers that are never given twice; one that has no name
any more was forgotten meanwhile, and is left out.

Invariants (``check``): ``entries`` counts what is held; a source that is synced and not partial has the
digests that were told last; who is unknown is in no answer.

The sum: 1 us a batch and 0.1 us a block applied, 30 bytes a block held; a match is the native one and 0.5 us.
"""

from __future__ import annotations

import sys
import threading
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from kvcache import index as prefix_index
from kvcache.block import HASH_BYTES, HINT_BYTES, NamespaceId
from kvcache.errors import BadInput
from kvcache.index import ALL_TIERS, Index
from kvcache.locality_found import Found as Found
from kvcache.locality_found import Located as Located
from kvcache.locality_found import Names, Namespaces, best, joined, within
from kvcache.locality_placed import PLACE_NS as PLACE_NS
from kvcache.locality_placed import Placements
from kvcache.locality_source import BEAT_NS as BEAT_NS
from kvcache.locality_source import LOST as LOST
from kvcache.locality_source import Applied as Applied
from kvcache.locality_source import AsOf as AsOf
from kvcache.locality_source import Load as Load
from kvcache.locality_source import Source
from kvcache.locality_view import NAMESPACES_MAX, Content, View
from kvcache.locality_view import TIERS as TIERS
from kvcache.namespace import Namespace
from kvcache.wire import BlockEvent, EventBatch
from kvcache.wire_events import run_lengths

if TYPE_CHECKING:
    from typing_extensions import Buffer

SOURCES_MAX = 65_536
PLACED_SHARE = 16
"""Of the memory, this part is for placements."""

assert sys.byteorder == "little", "hints are read as they travel"


class LocalityIndex:
    """Any number of sources. Reads no clock: ``now_ns`` is that of its caller. Nothing is waited for, but a
    page of 100,000 blocks takes 10 to 60 ms to apply, and dropping a million 0.2 s; the interpreter's lock is
    free meanwhile."""

    def __init__(self, bytes_max: int, make: Callable[[int], Index] = prefix_index.make_index) -> None:
        """``bytes_max``: the most memory to take. ``make`` makes the structure."""
        assert bytes_max > 0
        self._content = Content(make(bytes_max - bytes_max // PLACED_SHARE))
        self._placed = Placements(make(max(1, bytes_max // PLACED_SHARE)))
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._sources: dict[str, Source] = {}  # Grows, or is replaced, as all that readers look into.
        self._numbers: dict[int, str] = {}
        self._next_number = 0
        self._namespaces: dict[NamespaceId, Namespace] = {}
        self._names = Names(self._numbers, self._content.ids, frozenset())
        self._ticked_ns: int | None = None
        self._back_ns = -BEAT_NS
        """When we were last found to have been away."""

    # --- limits ---------------------------------------------------------------------------------

    @property
    def entries(self) -> int:
        """Blocks held, each counted once a shard and tier; those of a snapshot being loaded too."""
        with self._lock:
            return sum(view.entries for view in self._views())

    def entries_of(self, source: str, tenant: str | None = None) -> int:
        """Of these, those of one source, and of one tenant where one is given; 0 where it is not heard of."""
        known = self._sources.get(source)
        if known is None:
            return 0
        with self._lock:
            if tenant is None:
                return sum(view.entries for view in known.views())
            theirs = [each for each, fields in self._namespaces.items() if fields.tenant == tenant]
            numbers = {self._content.numbers.get(each, -1) for each in theirs}
            return sum(view.entries_in(numbers) for view in known.views())

    @property
    def bytes(self) -> int:
        """What is taken now: the structure's share of it; names and counts are bounded apart."""
        return self._content.index.bytes + self._placed.bytes

    @property
    def bytes_max(self) -> int:
        return self._bytes_max

    @property
    def refused_blocks(self) -> int:
        """Blocks for which there was no room, so far."""
        return self._content.refused_blocks

    # --- what is told ---------------------------------------------------------------------------

    def apply(self, batch: EventBatch, now_ns: int) -> Applied:
        """Take one batch: events, a beat, or a page of a snapshot. RAISES BadInput, having taken nothing of
        it, when it makes no sense."""
        _check_meaning(batch)
        names = [Namespace.from_map(fields) for fields in batch.namespaces]
        with self._lock:
            source = self._source(batch.source, batch.incarnation)
            if names:
                self._name(names)
            restarted = batch.incarnation > source.incarnation
            applied = source.take(batch, now_ns)
            if restarted:
                self._placed.forget(source.number)
            elif self._placed.is_active and applied is Applied.TAKEN and not batch.snapshot:
                self._placed.told(source.number, batch.events, self._content.numbers)
            self._mark(source)
            return applied

    def cursor(self, source: str) -> tuple[int, int] | None:
        """The incarnation and the seq behind which this source's stream is to be taken up again; None: a
        snapshot is needed."""
        known = self._sources.get(source)
        return known.cursor() if known is not None else None

    def suspect(self, source: str) -> None:
        """The stream of this source broke: what it held is served on, marked, until its next batch in order,
        its next beat, or a snapshot."""
        with self._lock:
            known = self._sources.get(source)
            if known is not None:
                known.suspect()
                self._mark(known)

    def heard(self, source: str, now_ns: int) -> None:
        """The source is alive, and everything it told up to ``now_ns`` was applied. For sources that tell no
        beats; they are dropped as others are, unless this is called."""
        with self._lock:
            known = self._sources.get(source)
            if known is not None:
                known.heard(now_ns)
                self._mark(known)

    def forget(self, source: str) -> None:
        """The source is gone for good."""
        with self._lock:
            known = self._sources.get(source)
            if known is None:
                return
            self._sources = {name: each for name, each in self._sources.items() if name != source}
            self._numbers = {each.number: name for name, each in self._sources.items()}
            known.close()
            self._placed.forget(known.number)
            self._rename(self._names.suspects - {known.number})

    def tick(self, now_ns: int) -> list[str]:
        """To be called some times a beat. Who missed a beat is suspect, who missed three is dropped: what it
        told is forgotten, and its state unknown. Returns who was dropped just now. Placements end.

        For a beat after a pause of one between two calls nobody is dropped: it was we who were away, what was
        told meanwhile may be there to be read, and who stood still with us needs a moment to speak again."""
        with self._lock:
            if self._ticked_ns is not None and now_ns - self._ticked_ns > BEAT_NS:
                self._back_ns = now_ns
            self._ticked_ns = now_ns
            may_drop = now_ns >= self._back_ns + BEAT_NS
            dropped = [each for each in self._sources.values() if each.tick(now_ns, may_drop)]
            for source in dropped:
                self._placed.forget(source.number)
            for source in self._sources.values():
                self._mark(source)
            self._sweep()
        self._placed.tick(now_ns)
        return [source.name for source in dropped]

    def place(self, source: str, namespace: NamespaceId, hints: Buffer, now_ns: int) -> int:
        """A prompt was sent to this source, which will hold its blocks soon: predict them for ``PLACE_NS`` to
        twice that. ``hints`` from the first block on. Returns how many are not predicted for want of room,
        all of them where the source is not heard of yet."""
        known = self._sources.get(source)
        number = self._content.numbers.get(namespace)
        if number is None:
            with self._lock:
                number = self._content.number(namespace)
        if known is None or number is None:
            return memoryview(hints).nbytes // HINT_BYTES
        return self._placed.place(known.number, number, hints, now_ns)

    # --- what is asked --------------------------------------------------------------------------

    def match(
        self,
        hints: Buffer,
        namespaces: Namespaces | None = None,
        *,
        sources: Collection[str] | None = None,
        tiers: int = ALL_TIERS,
        limit: int | None = None,
    ) -> Found:
        """Who holds the first of these blocks (u64, or bytes), and how many of those behind it, in the tiers
        of the mask ``tiers`` (bit 0: the first of ``TIERS``). Only of these namespaces and sources, where
        given; of these the ``limit`` that hold most. RAISES BadInput."""
        candidates = None if sources is None else self._numbers_of(sources)
        placed = self._placed.match(hints, candidates)
        if placed is None and namespaces is None:
            table = self._content.index.match(hints, tiers, candidates, limit).table
            return Found(table, self._names)
        table = self._content.index.match(hints, tiers, candidates).table
        names = self._names
        if placed is not None:
            table = joined(table, placed)
        if namespaces is not None:
            table = within(table, names, namespaces)
        return Found(table if limit is None else best(table, limit), names)

    def locate(self, hints: Buffer, namespaces: Namespaces | None = None) -> list[Located]:
        """What each shard has of these blocks, shards with nothing included, by source and namespace. With
        ``namespaces``, only shards of these."""
        found = {(each.source, each.namespace): each for each in self.match(hints, namespaces).located()}
        ids = self._content.ids
        for source in self._sources.copy().values():
            for number in source.view.holders.copy():
                namespace = ids.get(number)
                if namespace is not None and (namespaces is None or namespace in namespaces):
                    found.setdefault((source.name, namespace), Located(source.name, namespace, 0, _NONE))
        return [found[key] for key in sorted(found)]

    def held(self, source: str, namespace: NamespaceId, tier: str) -> memoryview:
        """All that one shard holds in a tier, as u64 in no order."""
        known, number = self._sources.get(source), self._content.numbers.get(namespace)
        holder = known.view.holders.get(number) if known is not None and number is not None else None
        try:
            if holder is not None:
                return self._content.index.held(holder, TIERS.index(tier))
        except BadInput:
            pass  # It was forgotten meanwhile.
        return memoryview(array("Q"))

    def sources(self) -> list[AsOf]:
        """How current the index is, source by source."""
        return [source.as_of() for source in self._sources.copy().values()]

    def as_of(self, source: str) -> AsOf | None:
        """How current it is of this one; None: it is not heard of."""
        known = self._sources.get(source)
        return known.as_of() if known is not None else None

    def load(self, source: str) -> Load | None:
        """How busy this source said it is, and when; None: it said nothing."""
        known = self._sources.get(source)
        return known.load if known is not None else None

    def namespace(self, namespace: NamespaceId) -> Namespace | None:
        """All its fields, if a source told them."""
        return self._namespaces.get(namespace)

    def known_namespaces(self) -> list[NamespaceId]:
        return list(self._namespaces.copy())

    def check(self) -> None:
        """Assert every invariant. Takes time in proportion to what is held."""
        with self._lock:
            self._content.index.check()
            self._placed.check()
            for source in self._sources.values():
                source.check()
                assert source.synced == (source.number not in self._names.suspects)
            holders = sum(len(view.holders) for view in self._views())
            assert holders == self._content.holders == self._content.index.stats()["rows"]

    def _numbers_of(self, sources: Collection[str]) -> array[int]:
        known = map(self._sources.get, sources)
        return array("I", [source.number for source in known if source is not None])

    # --- under the lock -------------------------------------------------------------------------

    def _source(self, name: str, incarnation: int) -> Source:
        source = self._sources.get(name)
        if source is None:
            if len(self._sources) == SOURCES_MAX:
                raise _refusal("too_large", "events of one source more than an index follows")
            source = Source(name, self._next_number, incarnation, self._content)
            self._next_number += 1
            self._numbers[source.number] = name
            self._sources[name] = source
        return source

    def _views(self) -> Iterator[View]:
        return chain.from_iterable(source.views() for source in self._sources.values())

    def _mark(self, source: Source) -> None:
        suspects = self._names.suspects
        if source.synced == (source.number in suspects):
            self._rename(suspects ^ {source.number})

    def _rename(self, suspects: frozenset[int]) -> None:
        self._names = Names(self._numbers, self._content.ids, suspects)

    def _name(self, names: Sequence[Namespace]) -> None:
        for namespace in names:
            if len(self._namespaces) < NAMESPACES_MAX:
                namespace_id = namespace.namespace_id()
                self._namespaces[namespace_id] = namespace
                self._content.number(namespace_id)

    def _sweep(self) -> None:
        """Numbers and names that nobody uses any more go, once there are many."""
        if len(self._content.ids) < NAMESPACES_MAX // 2:
            return
        held = chain.from_iterable(view.holders for view in self._views())
        self._content.sweep({*held, *self._placed.namespaces()})
        kept = set(self._content.ids.values())
        self._namespaces = {each: name for each, name in self._namespaces.items() if each in kept}
        self._rename(self._names.suspects)


_NONE = (0,) * len(TIERS)
_KINDS = frozenset({"stored", "removed", "cleared"})


def _check_meaning(batch: EventBatch) -> None:
    for event in batch.events:
        if event.tier not in TIERS or event.kind not in _KINDS:
            raise _nonsense(event)
        if len(event.namespace) != HASH_BYTES or len(event.hashes) % HINT_BYTES:
            raise _nonsense(event)
        if event.parent and len(event.parent) != HINT_BYTES:
            raise _nonsense(event)
        if event.runs and not _are_runs(event):
            raise _nonsense(event)
    if batch.beat and (batch.events or batch.snapshot):
        raise _refusal("bad_message", "a beat that is also something else")


def _are_runs(event: BlockEvent) -> bool:
    """Whether they are those of its blocks."""
    if len(event.runs) % 2:
        return False
    lengths = memoryview(run_lengths(event)).cast("H").tolist()
    return 0 not in lengths and sum(lengths) == len(event.hashes) // HINT_BYTES


def _nonsense(event: BlockEvent) -> BadInput:
    return _refusal("bad_message", f"an event of kind {event.kind[:20]!r} in tier {event.tier[:20]!r}")


def _refusal(code: str, what: str) -> BadInput:
    return BadInput(
        code, what, "it is none that a source tells", "run the same release of kvcache on both sides"
    )
