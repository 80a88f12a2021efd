"""A tcp transport that listens, for tests that speak to it byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from kvcache.clock import NS_PER_MS
from kvcache.testing.stalls import Stalls
from kvcache.testing.transport_pair import CALM, LATE_NS, Notes, noise, soon
from kvcache.transport.base import Endpoint, Limits
from kvcache.transport.keys import CONNECTS, LISTENS, NONCE_BYTES, PROOF_BYTES, is_proof, proof, shown
from kvcache.transport.tcp import DEFAULT_ADDRESS, TcpTransport
from kvcache.transport.tcp_frames import CHALLENGE, Hello
from kvcache.transport.tcp_listener import TcpListener

WARY = Limits(heartbeat_ns=50 * NS_PER_MS, silence_ns=300 * NS_PER_MS)
PATIENCE_S = 20
HELLO_ALONE = Hello(bytes(16), 0, 1, bytes(NONCE_BYTES))

Visitor = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Place:
    """A transport that listens, and who it has accepted."""

    transport: TcpTransport
    notes: Notes
    accepted: list[Endpoint]
    listener: TcpListener
    host: str
    port: int
    writers: list[asyncio.StreamWriter]
    """Of all who came, closed at the end."""

    async def stranger(self, host: str = "127.0.0.1") -> Visitor:
        """``host``: where he comes from."""
        reader, writer = await asyncio.open_connection(self.host, self.port, local_addr=(host, 0))
        self.writers.append(writer)
        return reader, writer

    async def challenged(self, hello: Hello = HELLO_ALONE) -> tuple[Visitor, bytes]:
        """A stranger who has said hello and was asked for his proof; and what both have said."""
        reader, writer = await self.stranger()
        writer.write(hello.pack())
        return (reader, writer), hello.pack() + await reader.readexactly(CHALLENGE.size)

    async def proven(self, hello: Hello = HELLO_ALONE, key: bytes = b"") -> Visitor:
        """A stranger who has proved that he knows the key."""
        (reader, writer), said = await self.challenged(hello)
        writer.write(proof(key, CONNECTS, said))
        assert is_proof(await reader.readexactly(PROOF_BYTES), key, LISTENS, said)
        return reader, writer

    async def guest(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Endpoint]:
        """A stranger who was let in, and the endpoint that he got."""
        reader, writer = await self.proven()
        while not self.accepted:
            await asyncio.sleep(0)
        return reader, writer, self.accepted.pop()

    async def still_serves(self) -> None:
        other = TcpTransport(CALM)
        try:
            end = await other.connect(self.listener.address, soon(), Notes().hear)
            into = [memoryview(bytearray(70_000))]
            source = [memoryview(noise(1, 70_000))]
            await end.read(self.transport.export(source, soon()), into, soon())
            assert into[0] == source[0]
        finally:
            await other.close()


@contextlib.asynccontextmanager
async def soon_over(time_ns: int) -> AsyncIterator[None]:
    """What is done within takes this time at most, but for what the machine stands still."""
    with Stalls() as stalls:
        began_ns = stalls.awake_ns()
        async with asyncio.timeout(PATIENCE_S):
            yield
        assert stalls.awake_ns() - began_ns <= time_ns + LATE_NS


def visit(scenario: Callable[[Place], Awaitable[None]], limits: Limits = CALM, key: bytes = b"") -> None:
    """Whatever the stranger does, nothing is raised on the loop, and the next peer is served."""

    async def main() -> None:
        raised: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
        async with place(limits, key) as found:
            await scenario(found)
            await found.still_serves()
        assert raised == []

    asyncio.run(main())


@contextlib.asynccontextmanager
async def place(limits: Limits, key: bytes) -> AsyncIterator[Place]:
    transport, notes, accepted = TcpTransport(limits, key=key), Notes(), list[Endpoint]()
    listener = await transport.listen(DEFAULT_ADDRESS, accepted.append, notes.hear)
    host, _, port = shown(listener.address).removeprefix("tcp://").rpartition(":")
    found = Place(transport, notes, accepted, listener, host, int(port), [])
    try:
        yield found
    finally:
        for writer in found.writers:
            writer.close()
        await transport.close()
