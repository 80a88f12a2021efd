"""Blocks from a peer that is still writing them, plane after plane, into host memory here.

    ask ──► Follow at the named peer ── "held" ──────► an ordinary fetch ──► the next of the prefix
              │        └── nothing yet ──► fetched from others, else asked again, while somebody wants it
              │ "writing": a run, the blocks of one reservation there
              ▼
    slots reserved here ──► planes read as they come, each verified while the next is on its way
              │ all planes of all its blocks are in, and verified
              ▼
    the run is committed here ──► the next of the prefix

A run comes whole or not at all: whatever goes wrong, its slots are given back and nothing of it was ever to
be found; what came before stays, the rest is a miss. It may be committed here before the peer has: the peer's
writer has promised these sums, and every chunk was verified by them.

Ten who ask for one block cause one stream. Whoever waits has a deadline; the stream goes on without him.

Invariants: a block that is coming belongs to exactly one flight; a slot that is read into stays reserved
until the read has ended; with what comes from elsewhere, at most a quarter of the host tier is on its way,
or one run.

The sum: a round trip and 100 us of the event loop for all planes that are ready; so the last plane is here
some 0.3 ms and its own bytes after it was written, where a fetch after the commit moves all of them then.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Protocol

from kvcache.block import NamespaceId, StorageKey
from kvcache.clock import NS_PER_S, Clock
from kvcache.errors import BadInput
from kvcache.ledger import Ledger, Reservation
from kvcache.namespace import Namespace
from kvcache.peers.fetch import Asked
from kvcache.peers.peer import Peer, Sums
from kvcache.peers.stream import Stream, StreamFailed, translated
from kvcache.policy import RequestContext
from kvcache.sums import SUM_BYTES, block_checksum
from kvcache.tiers.host import HostTier
from kvcache.tiers.promote import IN_FLIGHT_PARTS, OWNER
from kvcache.wire import Followed

log = logging.getLogger("kvcache.peers")

FLIGHTS_MAX = 256
REST_NS = NS_PER_S
"""What did not come is not waited for again so soon: the engine is computing it."""
RESTING_MAX = 4_096
TRIES_MAX = 3
"""So often is a run asked for that is another one each time."""
MILD = frozenset({"none", "gone", "full", "busy", "parent", "fetch", "stalled"})
"""Failures after which the connection is as good as before."""


@dataclass(frozen=True, slots=True)
class Patience:
    """``begin_ns``: for a peer that has nothing of it yet, since somebody asked last; ``stall_ns``: for the
    next plane; ``fetch_ns``: for a fetch of what it holds."""

    begin_ns: int = 10 * NS_PER_S
    stall_ns: int = 10 * NS_PER_S
    fetch_ns: int = 5 * NS_PER_S


class Fetches(Protocol):
    """What is asked of ``kvcache.peers.fetch.Fetcher``."""

    def ask(self, keys: Sequence[StorageKey], first: int, asked: Asked) -> int: ...

    async def wait(self, keys: Sequence[StorageKey], wait_ns: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Around:
    """What a Receiver works on. ``settle`` is called after every change of the ledger, ``committed`` is told
    of a path that was published and is to be kept."""

    ledger: Ledger
    memory: HostTier
    clock: Clock
    counters: Counter[str]
    settle: Callable[[], None]
    committed: Callable[[Sequence[StorageKey]], None]
    sums: Sums
    named: Callable[[str], Peer | None]
    namespace: Callable[[NamespaceId], Namespace | None]
    fetcher: Fetches
    keep: bool = True


class _Flight:
    """Blocks of one path on their way from one peer. ``asked.parent`` is the block before the first."""

    def __init__(
        self, peer: Peer, keys: tuple[StorageKey, ...], asked: Asked, until_ns: int, after: _Flight | None
    ) -> None:
        self.peer = peer
        self.keys = keys
        self.asked = asked
        self.until_ns = until_ns
        """Not waited for the peer to begin any longer than that."""
        self.after = after
        self.has_begun = False
        """The peer holds, or writes, some of it."""
        self.is_over = False
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def tell(self) -> None:
        """Something of it has come, or nothing will: who waits looks again."""
        self._changed.set_result(None)
        self._changed = asyncio.get_running_loop().create_future()

    @property
    def changed(self) -> asyncio.Future[None]:
        return self._changed

    async def ended(self) -> None:
        while not self.is_over:
            await asyncio.wait([self._changed])


class Receiver:
    """One owner, the event loop's thread."""

    def __init__(self, around: Around, patience: Patience | None = None) -> None:
        self._around = around
        self._patience = patience or Patience()
        self._coming: dict[StorageKey, _Flight] = {}
        self._flights: dict[_Flight, asyncio.Task[None]] = {}
        self._resting: dict[StorageKey, int] = {}
        self._bytes_max = around.memory.capacity_bytes // IN_FLIGHT_PARTS
        self._is_closed = False

    def ask(self, keys: Sequence[StorageKey], first: int, asked: Asked) -> int:
        """How many leading blocks are in host memory, or will be if all goes well, given that the leading
        ``first`` are. Starts following ``asked.source`` for the others."""
        at = first
        while at < len(keys) and (flight := self._coming.get(keys[at])) is not None:
            flight.until_ns = self._until_ns()
            at += 1
        peer = self._around.named(asked.source)
        if at == len(keys) or peer is None or not peer.is_up or not self._may_follow(keys[at]):
            return at
        mine = tuple(takewhile(lambda key: key not in self._coming, keys[at:]))
        before = keys[at - 1] if at else asked.parent
        after = self._coming.get(before) if before is not None else None
        flight = _Flight(peer, mine, replace(asked, parent=before), self._until_ns(), after)
        task = asyncio.get_running_loop().create_task(self._bring(flight))
        self._flights[flight] = task
        self._coming.update(dict.fromkeys(mine, flight))
        task.add_done_callback(partial(self._ended, flight))
        return at + len(mine)

    def coming(self, keys: Sequence[StorageKey]) -> int:
        """How many of these, leading, are on their way: of what the peer has begun to write."""
        for at, key in enumerate(keys):
            flight = self._coming.get(key)
            if flight is None or not flight.has_begun:
                return at
        return len(keys)

    def awaits(self, key: StorageKey) -> bool:
        """Is it followed, be it that the peer has begun or not?"""
        return key in self._coming

    async def wait(self, keys: Sequence[StorageKey], wait_ns: int) -> None:
        """Until none of these is on its way any more, or the time is over."""
        end_ns = self._around.clock.now_ns() + wait_ns
        while flights := {self._coming[key] for key in keys if key in self._coming}:
            left_ns = end_ns - self._around.clock.now_ns()
            if left_ns <= 0:
                return
            changes = [flight.changed for flight in flights]
            await asyncio.wait(changes, timeout=left_ns / NS_PER_S, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Give up what is on its way: then no transfer touches host memory. May be called twice."""
        self._is_closed = True
        tasks = list(self._flights.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- one flight -----------------------------------------------------------------------------

    def _until_ns(self) -> int:
        return self._around.clock.now_ns() + self._patience.begin_ns

    def _may_follow(self, key: StorageKey) -> bool:
        now_ns = self._around.clock.now_ns()
        if self._resting.get(key, now_ns) > now_ns:
            return False
        return not self._is_closed and len(self._flights) < FLIGHTS_MAX

    async def _bring(self, flight: _Flight) -> None:
        try:
            if flight.after is not None:
                await flight.after.ended()
            if flight.peer.streams(flight.asked.tenant).is_full and await self._fetched(flight):
                return
            mild = await self._on_a_connection(flight)
            if mild is not None:
                raise mild
        except StreamFailed as error:
            self._around.counters[f"receive_failures:{error.reason}"] += 1
            self._rest(flight)
            log.info("blocks did not come from %s (%s): %s", flight.peer.name, error.reason, error)

    async def _fetched(self, flight: _Flight) -> bool:
        """All connections are with those who wait for something to be written: what the peer holds needs
        none of them. Is it all here now?"""
        held = await self._fetch(flight.keys, 0, flight.asked)
        self._came(flight, held)
        return held == len(flight.keys)

    async def _on_a_connection(self, flight: _Flight) -> StreamFailed | None:
        """Other failures than those returned close it, and so end what the peer holds for it."""
        asked = flight.asked
        async with translated(), flight.peer.streams(asked.tenant).turn() as channel:
            namespace = self._around.namespace(asked.namespace)
            stream = Stream(flight.peer, channel, asked.namespace, namespace, asked.spec, self._around.clock)
            failed: StreamFailed | None = None
            try:
                await self._go_through(flight, stream)
            except StreamFailed as error:
                if error.reason not in MILD:
                    raise
                failed = error
            await stream.end()
        return failed

    async def _go_through(self, flight: _Flight, stream: Stream) -> None:
        at = wait_ns = tries = 0
        while True:
            if held := self._around.ledger.match(flight.keys[at:]):
                at += held
                wait_ns = tries = 0
                self._came(flight, at)
            if at == len(flight.keys):
                return
            followed = await stream.follow(flight.keys[at:], 0, wait_ns)
            flight.has_begun = flight.has_begun or followed.state != "none"
            if followed.state == "held":
                if not await self._fetch(flight.keys[: at + followed.count], at, flight.asked):
                    raise StreamFailed("fetch", "what the peer holds could not be fetched")
            elif followed.state == "writing":
                tries += 1
                if tries > TRIES_MAX:
                    raise StreamFailed("gone", "what the peer writes is something else each time")
                await self._receive(flight, stream, at, followed)
            elif wait_ns or not await self._fetch(flight.keys, at, replace(flight.asked, source="")):
                wait_ns = flight.until_ns - self._around.clock.now_ns()
                if wait_ns <= 0:
                    raise StreamFailed("none", "the peer has not begun to write them")

    def _came(self, flight: _Flight, count: int) -> None:
        """Its leading blocks are here."""
        flight.until_ns = self._until_ns()
        for key in flight.keys[:count]:
            if self._coming.get(key) is flight:
                del self._coming[key]
        flight.tell()

    async def _fetch(self, keys: Sequence[StorageKey], first: int, asked: Asked) -> int:
        """What is held elsewhere already. How many of them, from ``first`` on, are here then."""
        fetcher = self._around.fetcher
        if fetcher.ask(keys, first, asked) > first:
            await fetcher.wait(keys[first:], self._patience.fetch_ns)
        return self._around.ledger.match(keys[first:])

    def _rest(self, flight: _Flight) -> None:
        """The first block that did not come is not asked for so soon again."""
        now_ns = self._around.clock.now_ns()
        if len(self._resting) >= RESTING_MAX:
            self._resting = {key: until for key, until in self._resting.items() if until > now_ns}
        key = next((key for key in flight.keys if self._coming.get(key) is flight), None)
        if key is not None and len(self._resting) < RESTING_MAX:
            self._resting[key] = now_ns + REST_NS

    def _ended(self, flight: _Flight, task: asyncio.Task[None]) -> None:
        """However it ended, and even if it never began."""
        del self._flights[flight]
        for key in flight.keys:
            if self._coming.get(key) is flight:
                del self._coming[key]
        flight.is_over = True
        flight.tell()
        if not task.cancelled() and (error := task.exception()) is not None:
            # Our own code is wrong: as with any task of the node, the command ends the process.
            task.get_loop().call_exception_handler({"message": "a stream from a peer", "exception": error})

    # --- one run --------------------------------------------------------------------------------

    async def _receive(self, flight: _Flight, stream: Stream, at: int, followed: Followed) -> None:
        """The blocks that the peer writes together, or as many of them as there is room for."""
        around = self._around
        keys = flight.keys[at : at + followed.count]
        reservation = self._reserve(flight, at, keys)
        if reservation is None:
            return
        size = len(reservation.keys) * reservation.block_bytes
        around.memory.coming_bytes += size
        done = False
        try:
            if reservation.keys != keys:  # The ticket is for others too.
                followed = await stream.follow(reservation.keys, 0, 0)
            if followed.state == "writing" and followed.count == len(reservation.keys):
                sums = await self._read(stream, reservation, flight.asked, followed)
                self._publish(reservation, flight.asked, sums)
                done = True
        finally:
            around.memory.coming_bytes -= size
            if not done:
                around.ledger.abort(reservation.reservation_id, OWNER)
            around.settle()

    def _reserve(self, flight: _Flight, at: int, keys: tuple[StorageKey, ...]) -> Reservation | None:
        """None when all of them are here now. RAISES StreamFailed."""
        around, asked = self._around, flight.asked
        size = asked.spec.block_bytes
        room = self._bytes_max - around.memory.coming_bytes
        most = len(keys) if not around.memory.coming_bytes else room // size
        if most <= 0:
            raise StreamFailed("full", "too much is on its way here")
        before = flight.keys[at - 1] if at else asked.parent
        context = RequestContext(now_ns=around.clock.now_ns(), priority=50 if around.keep else 0)
        try:
            reservation = around.ledger.reserve(asked.arena, before, keys[:most], size, OWNER, context)
        except BadInput as error:
            raise StreamFailed("parent", str(error)) from error
        around.settle()
        if reservation.reservation_id:
            return reservation
        if reservation.start == len(keys[:most]):
            return None
        raise StreamFailed("busy" if reservation.reason == "busy" else "full", reservation.reason)

    async def _read(
        self, stream: Stream, reservation: Reservation, asked: Asked, followed: Followed
    ) -> list[bytes]:
        """Every plane, verified. All chunk sums of each block. RAISES StreamFailed."""
        spec, around = asked.spec, self._around
        blocks = [around.memory.view(slot, spec.block_bytes) for slot in reservation.slots]
        told = [b""] * len(blocks)
        plane = 0
        verifying: asyncio.Task[None] | None = None
        try:
            while True:
                end = plane + followed.planes
                views = [block[plane * spec.plane_bytes : end * spec.plane_bytes] for block in blocks]
                await stream.read(followed, views)
                if verifying is not None:
                    await verifying
                verifying = asyncio.create_task(self._verify(views, spec.chunk_bytes, followed.sums))
                step = followed.planes * spec.plane_bytes // spec.chunk_bytes * SUM_BYTES
                told = [
                    sums + followed.sums[number * step : (number + 1) * step]
                    for number, sums in enumerate(told)
                ]
                around.counters["streamed_planes"] += followed.planes * len(blocks)
                around.counters["streamed_bytes"] += sum(map(len, views))
                plane = end
                if plane == spec.plane_count:
                    await verifying
                    return told
                followed = await stream.follow_on(reservation.keys, plane, self._patience.stall_ns)
        finally:
            if verifying is not None:
                verifying.cancel()
                await asyncio.gather(verifying, return_exceptions=True)

    async def _verify(self, views: Sequence[memoryview], chunk_bytes: int, told: bytes) -> None:
        if await self._around.sums(views, chunk_bytes) != told:
            self._around.counters["peer_rejected_blocks:checksum"] += len(views)
            raise StreamFailed("sums", "the bytes that came do not have the sums that were told")

    def _publish(self, reservation: Reservation, asked: Asked, sums: Sequence[bytes]) -> None:
        around, spec = self._around, asked.spec
        checksums = [
            block_checksum(key, spec.block_bytes, spec.chunk_bytes, told)
            for key, told in zip(reservation.keys, sums, strict=True)
        ]
        around.ledger.commit(reservation.reservation_id, OWNER, checksums, sums)
        around.counters["streamed_blocks"] += len(checksums)
        if around.keep and around.ledger.has(reservation.keys[-1]):
            around.committed(reservation.keys)
