"""Blocks that no peer holds, made of those that peers hold for ranks of another tensor parallel degree.

    find ──► a peer holds them ──────────────────────────────────────► that peer
      └────► peers hold the same prefix for ranks that can be cut ───► a ``Cut`` of them, as if it were a peer
                (``kvcache.slices``: certified, or not at all)

    of each part, in steps   chunks that cover the heads ─► scratch, verified as stored ─► into the slots
    when all parts are in    chunk sums of the slots ─► checksums of the blocks that were wanted

A slot has all its parts, each verified, or its block does not count. What was made is then a block like any
other: committed, found, written to NVMe and given to others under its own name.

Invariants: at most ``CUTS_MAX`` groups are cut at a time, with a scratch of ``SCRATCH_BYTES``, or one block,
for each part; when a fetch has returned or raised, nothing touches its memory; no namespace is cut that is
not certified.

The sum: beside what ``peer`` costs, a copy of what is wanted and a sum of it: 1 ms a group of 8 MiB, in
threads. What is read is the chunks that cover the heads: half of a block for half of its heads where a plane
is 128 KiB, all of it where a plane is one chunk. Plans are made once for each namespace: 0.1 ms.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcache.block import HASH_BYTES, BlockHash, BlockSpec, NamespaceId, StorageKey, storage_key
from kvcache.clock import Clock
from kvcache.namespace import Namespace
from kvcache.peers.directory import Candidate, Directory, Giver
from kvcache.peers.fetch import GONE_REST_NS, WRONG_REST_NS
from kvcache.peers.load import Load
from kvcache.peers.peer import Arrived, FetchFailed, Sums, Wanted
from kvcache.slices import Part, plans
from kvcache.sums import SUM_BYTES, block_checksum, copy_and_sum
from kvcache.transport.base import Priority, TransferLate
from kvcache.transport.flow import until
from kvcache.uncancelled import to_the_end
from kvcache.wire import SUMS_BYTES_MAX

CUTS_MAX = 4
SCRATCH_BYTES = 8 << 20
PIECES_MAX = 16_384
"""Of one ticket: what every transport takes."""


@dataclass(frozen=True, slots=True)
class Way:
    """One part of what is wanted, and the namespace that has it."""

    part: Part
    namespace: NamespaceId

    def keys(self, wanted: Sequence[StorageKey]) -> list[StorageKey]:
        """What the same blocks are called there."""
        return [storage_key(self.namespace, BlockHash(key[HASH_BYTES:])) for key in wanted]

    @property
    def is_direct(self) -> bool:
        """Do the chunks that come fit into their places, piece by piece?"""
        return self.part.cut.is_exact and not self.part.cut.cover.is_whole

    @property
    def blocks_a_step(self) -> int:
        cover = self.part.cut.cover
        sums_bytes = cover.spec.chunk_count * SUM_BYTES
        most = (
            SCRATCH_BYTES // cover.block_bytes,
            PIECES_MAX // cover.piece_count,
            SUMS_BYTES_MAX // sums_bytes,
        )
        return max(1, min(most))

    def places(self, slots: Sequence[memoryview], wanted: BlockSpec) -> list[memoryview]:
        """Where it belongs in blocks of ``wanted``: block after block, plane after plane."""
        cut = self.part.cut
        first = self.part.at * wanted.head_bytes
        starts = range(first, wanted.block_bytes, wanted.plane_bytes)
        return [slot[at : at + cut.length] for slot in slots for at in starts]

    def room(self, block_count: int) -> tuple[list[memoryview], list[memoryview]]:
        """Scratch for what comes: in the pieces in which it comes, and in those in which it is wanted."""
        cut, cover = self.part.cut, self.part.cut.cover
        scratch = memoryview(bytearray(block_count * cover.block_bytes))
        step = cover.block_bytes // cover.piece_count
        lead = cut.offset - cover.offset
        came = [scratch[at : at + step] for at in range(0, len(scratch), step)]
        kept = [scratch[at : at + cut.length] for at in range(lead, len(scratch), cover.length)]
        return came, kept


@dataclass(frozen=True, slots=True)
class Donor:
    """``on_disk``: it may have to read these blocks first, and then those before them."""

    peer: Giver
    way: Way
    on_disk: bool


class Cuts:
    """A directory that, where nobody holds what is wanted, looks for what it can be made of. One owner, the
    event loop's thread."""

    def __init__(
        self,
        directory: Directory,
        namespace: Callable[[NamespaceId], Namespace | None],
        sums: Sums,
        clock: Clock,
        counters: Counter[str],
    ) -> None:
        """``namespace`` says what a namespace is that was opened here."""
        self.directory = directory
        self.turns = asyncio.Semaphore(CUTS_MAX)
        self.sums = sums
        self.clock = clock
        self.counters = counters
        self._namespace = namespace
        self._ways: dict[NamespaceId, tuple[int, list[tuple[Way, ...]]]] = {}

    def find(self, keys: Sequence[StorageKey], source: str = "") -> list[Candidate]:
        """As ``Directory.find``."""
        found = self.directory.find(keys, source)
        if found:
            return found
        cuts = [self._cut(ways, keys, source) for ways in self._known(NamespaceId(keys[0][:HASH_BYTES]))]
        return [each for each in cuts if each is not None]

    def blame(self, peer: Giver, keys: Sequence[StorageKey], rest_ns: int) -> None:
        """As ``Directory.blame``. A ``Cut`` has blamed those of its peers whose fault it was."""
        if not isinstance(peer, Cut):
            self.directory.blame(peer, keys, rest_ns)

    def _known(self, wanted: NamespaceId) -> list[tuple[Way, ...]]:
        """Every way to make blocks of ``wanted`` of what peers have told of. They never untell it."""
        index = self.directory.index
        known = index.known_namespaces()
        if wanted not in self._ways or self._ways[wanted][0] != len(known):
            namespace = self._namespace(wanted)
            others = [each for each in map(index.namespace, known) if each is not None]
            made = plans(namespace, others) if namespace is not None else []
            ways = [tuple(Way(part, part.stored.namespace_id()) for part in plan) for plan in made]
            self._ways[wanted] = (len(known), ways)
        return self._ways[wanted][1]

    def _cut(self, ways: Sequence[Way], keys: Sequence[StorageKey], source: str) -> Candidate | None:
        """Of the best peer for each part. None when one part cannot be had."""
        chosen: list[Candidate] = []
        for way in ways:
            found = self.directory.find(way.keys(keys), source)
            if not found:
                return None
            size = way.part.cut.cover.block_bytes
            chosen.append(min(found, key=lambda each, size=size: each.rank(0, len(keys), size)))  # type: ignore[misc]
        donors = [Donor(each.peer, way, each.on_disk) for each, way in zip(chosen, ways, strict=True)]
        blocks = min(each.blocks for each in chosen)
        in_memory = 0 if any(each.on_disk for each in chosen) else blocks
        return Candidate(Cut(self, donors), blocks, in_memory, all(each.is_current for each in chosen))


class Cut:
    """A ``Giver``: peers that together hold what a block is made of."""

    def __init__(self, cuts: Cuts, donors: Sequence[Donor]) -> None:
        self.turns = cuts.turns
        self.load: Load = donors[0].peer.load
        self._cuts = cuts
        self._donors = donors

    @property
    def address(self) -> str:
        return " + ".join(self._of(donor, donor.peer.address) for donor in self._donors)

    @property
    def name(self) -> str:
        return " + ".join(self._of(donor, donor.peer.name) for donor in self._donors)

    @property
    def may_be_asked(self) -> bool:
        return all(donor.peer.may_be_asked for donor in self._donors)

    async def fetch(
        self, wanted: Wanted, into: Sequence[memoryview], deadline_ns: int, priority: Priority
    ) -> Arrived:
        """As ``Peer.fetch``. REQUIRES: ``into`` are whole blocks."""
        try:
            async with asyncio.TaskGroup() as group:
                works = [self._take(donor, wanted, into, deadline_ns, priority) for donor in self._donors]
                taking = [group.create_task(work) for work in works]
        except ExceptionGroup as failed:  # All have ended: nothing is written any more.
            first = failed.exceptions[0]
            raise first from first.__cause__
        came = [task.result() for task in taking]
        good = min(len(each.blocks) for each in came)
        spec, step = wanted.spec, wanted.spec.chunk_count * SUM_BYTES
        joined = await self._cuts.sums(into[:good], spec.chunk_bytes) if good else b""
        sums = [joined[at : at + step] for at in range(0, len(joined), step)]
        keys = wanted.keys[:good]
        blocks = [
            (block_checksum(key, spec.block_bytes, spec.chunk_bytes, each), each)
            for key, each in zip(keys, sums, strict=True)
        ]
        self._cuts.counters["peer_cut_blocks"] += good
        wrong = sorted({at for each in came for at in each.wrong})
        return Arrived(blocks, min(each.given for each in came), wrong)

    async def _take(
        self,
        donor: Donor,
        wanted: Wanted,
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority,
    ) -> Arrived:
        """One part, to its places. RAISES FetchFailed."""
        cuts, peer = self._cuts, donor.peer
        keys = donor.way.keys(wanted.keys)
        try:
            async with until(deadline_ns, cuts.clock):
                await peer.turns.acquire()
        except TransferLate as error:
            raise FetchFailed("late", str(error)) from error
        try:
            came = await self._take_steps(donor, wanted, keys, into, deadline_ns, priority)
        except FetchFailed as error:
            if error.reason in ("gone", "refused"):
                cuts.directory.blame(peer, keys[:1], GONE_REST_NS)
            raise
        finally:
            peer.turns.release()
        if came.wrong:
            cuts.directory.blame(peer, [keys[at] for at in came.wrong], WRONG_REST_NS)
        elif came.given < len(keys):
            cuts.directory.blame(peer, [keys[came.given]], GONE_REST_NS)
        return came

    async def _take_steps(
        self,
        donor: Donor,
        wanted: Wanted,
        keys: Sequence[StorageKey],
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority,
    ) -> Arrived:
        way, cut, step = donor.way, donor.way.part.cut, donor.way.blocks_a_step
        total = Arrived([], 0, [])
        for at in range(0, len(keys), step):
            batch = keys[at : at + step]
            places = way.places(into[at : at + step], wanted.spec)
            room, kept = (places, []) if way.is_direct else way.room(len(batch))
            behind = [*way.keys(wanted.behind), *keys[:at]] if donor.on_disk else []
            part = Wanted(wanted.tenant, way.namespace, cut.spec, batch, cut.cover, behind)
            came = await donor.peer.fetch(part, room, deadline_ns, priority)
            count = len(came.blocks)
            if kept and count:
                pieces = count * cut.spec.plane_count
                await copied(kept[:pieces], places[:pieces], cut.length)
            wrong = [*total.wrong, *(at + each for each in came.wrong)]
            total = Arrived([*total.blocks, *came.blocks], total.given + came.given, wrong)
            if count < len(batch):
                break
        return total

    @staticmethod
    def _of(donor: Donor, peer: str) -> str:
        stored = donor.way.part.stored
        return f"{peer} (rank {stored.tp_rank} of {stored.tp_size})"


async def copied(sources: Sequence[memoryview], targets: Sequence[memoryview], piece_bytes: int) -> None:
    """In a thread. Ends only when the thread has, whatever happens meanwhile."""
    loop = asyncio.get_running_loop()
    copying = loop.run_in_executor(None, copy_and_sum, sources, targets, piece_bytes)
    cancelled = await to_the_end(copying)
    copying.result()
    if cancelled is not None:
        raise cancelled
