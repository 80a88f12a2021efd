"""Two transports of one kind and a connection between them, for the contract of transports."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from kvcache.clock import NS_PER_MS, NS_PER_S, SystemClock
from kvcache.testing.stalls import Stalls
from kvcache.testing.transport_peer import PeerProcess, Stoppable
from kvcache.transport.base import Endpoint, Limits, Ticket, Transport

CLOCK = SystemClock()
LATE_NS = 250 * NS_PER_MS
"""So far past its deadline a call may end, while the machine does not stand still."""
PATIENCE_NS = 20 * NS_PER_S
CALM = Limits(silence_ns=30 * NS_PER_S)
"""For tests that are not about silence: a machine that is busy must not look like a peer that is gone."""


def soon() -> int:
    """A deadline that a working transport does not meet."""
    return CLOCK.now_ns() + PATIENCE_NS


def noise(seed: int, byte_count: int) -> bytes:
    """Bytes without a zero among them, so that one that was not written shows."""
    return random.Random(seed).randbytes(byte_count).replace(b"\0", b"\1")


class Notes:
    """What was told, in order."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.speakers: list[Endpoint] = []
        self._came = asyncio.Event()

    def hear(self, endpoint: Endpoint, note: bytes) -> None:
        self.heard.append(note)
        self.speakers.append(endpoint)
        self._came.set()

    async def first(self, count: int) -> list[bytes]:
        """The first ``count`` notes, when they have come."""
        async with asyncio.timeout(20):
            while len(self.heard) < count:
                self._came.clear()
                await self._came.wait()
        return self.heard[:count]


class Pair:
    """``near`` connected to ``far``, who listens."""

    def __init__(self, near: Transport, far: Transport, stalls: Stalls | None = None) -> None:
        self.near = near
        self.far = far
        self.stalls = stalls or Stalls()
        self.near_notes = Notes()
        self.far_notes = Notes()
        self.near_end: Endpoint
        self.far_end: Endpoint
        self.address = ""

    async def join(self, address: str) -> None:
        accepted: asyncio.Queue[Endpoint] = asyncio.Queue()
        listener = await self.far.listen(address, accepted.put_nowait, self.far_notes.hear)
        self.address = listener.address
        self.near_end = await self.near.connect(self.address, soon(), self.near_notes.hear)
        async with asyncio.timeout(20):
            self.far_end = await accepted.get()

    async def close(self) -> None:
        await self.near.close()
        await self.far.close()


class Guest:
    """The near side of a connection to a peer that can be stopped, with the tickets it gives."""

    def __init__(self, peer: Stoppable, transport: Transport, stalls: Stalls) -> None:
        self.peer = peer
        self.transport = transport
        self.stalls = stalls
        self.notes = Notes()
        self.end: Endpoint

    async def join(self) -> None:
        self.end = await self.transport.connect(self.peer.address, soon(), self.notes.hear)

    async def ask(self, word: str, count: int, size: int) -> Ticket:
        """A ticket of the peer's, for so many pieces of this size."""
        told = len(self.notes.heard)
        await self.end.notify(f"{word} {count} {size}".encode(), soon())
        return Ticket((await self.notes.first(told + 1))[-1])


Scenario = Callable[[Pair], Awaitable[None]]
Visit = Callable[[Guest], Awaitable[None]]


class TransportHouse:
    """What the parts of the contract stand on: how to make a transport, its memory, and a peer to stop."""

    address = ""
    """Where a test listens: ``tcp://127.0.0.1:0``; another one each time if it must be."""

    def make(self, limits: Limits) -> Transport:
        """A new transport for the running loop; several within one test reach each other."""
        raise NotImplementedError

    def memory(self, byte_count: int) -> memoryview:
        """Zeroed memory that a transport can use."""
        return memoryview(bytearray(byte_count))

    async def prepared(self, transport: Transport, memory: memoryview) -> None:
        """Until ``register`` has done what it does in the background: here nothing."""

    async def peer(self, limits: Limits) -> Stoppable:
        """An ``Obedient`` peer; closed by the test."""
        return await asyncio.to_thread(PeerProcess, self.address, limits)

    def filled_memory(self, seed: int, sizes: Sequence[int]) -> list[memoryview]:
        pieces = self.rooms(sizes)
        for at, piece in enumerate(pieces):
            piece[:] = noise(seed + at, len(piece))
        return pieces

    def rooms(self, sizes: Sequence[int]) -> list[memoryview]:
        """Pieces of one region, as blocks lie in a slab, 64 bytes apart at least."""
        region = self.memory(sum(sizes) + 64 * len(sizes))
        pieces: list[memoryview] = []
        at = 0
        for size in sizes:
            pieces.append(region[at : at + size])
            at += -(-size // 64) * 64
        return pieces

    def play(self, scenario: Scenario, limits: Limits = CALM) -> None:
        async def main(stalls: Stalls) -> None:
            pair = Pair(self.make(limits), self.make(limits), stalls)
            try:
                await pair.join(self.address)
                await scenario(pair)
            finally:
                await pair.close()

        with Stalls() as stalls:
            asyncio.run(main(stalls))

    def visit(self, visit: Visit, limits: Limits = CALM) -> None:
        """As ``play``, with a peer that can be stopped."""

        async def main(stalls: Stalls) -> None:
            async with self._guest(limits, stalls) as guest:
                await visit(guest)

        with Stalls() as stalls:
            asyncio.run(main(stalls))

    @asynccontextmanager
    async def _guest(self, limits: Limits, stalls: Stalls) -> AsyncIterator[Guest]:
        peer = await self.peer(limits)
        transport = self.make(limits)
        try:
            guest = Guest(peer, transport, stalls)
            await guest.join()
            yield guest
        finally:
            await transport.close()
            await peer.close()


def contents(pieces: Sequence[memoryview]) -> list[bytes]:
    return [bytes(piece) for piece in pieces]


async def turns(count: int) -> None:
    """Let everything else on the loop have so many turns."""
    for _ in range(count):
        await asyncio.sleep(0)


async def lost(endpoint: Endpoint) -> None:
    """Until the endpoint is lost, which nobody is told."""
    until_ns = soon()
    while not endpoint.is_lost:
        assert CLOCK.now_ns() < until_ns, "it should be lost by now"
        await asyncio.sleep(0.002)
