"""A tcp transport that listens, for tests that speak to it byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from kvcache.clock import NS_PER_MS
from kvcache.testing.transport_pair import CALM, Notes, noise, soon
from kvcache.transport.base import Endpoint, Limits
from kvcache.transport.tcp import DEFAULT_ADDRESS, TcpTransport
from kvcache.transport.tcp_frames import HELLO, Hello

WARY = Limits(heartbeat_ns=50 * NS_PER_MS, silence_ns=300 * NS_PER_MS)
HELLO_ALONE = Hello(bytes(16), 0, 1)


@dataclass
class Place:
    """A transport that listens, and who it has accepted."""

    transport: TcpTransport
    notes: Notes
    accepted: list[Endpoint]
    host: str
    port: int

    async def stranger(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)

    async def guest(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Endpoint]:
        """A stranger who has said hello, and the endpoint that he got."""
        reader, writer = await self.stranger()
        writer.write(HELLO_ALONE.pack())
        assert Hello.parse(bytearray(await reader.readexactly(HELLO.size))) == HELLO_ALONE
        while not self.accepted:
            await asyncio.sleep(0)
        return reader, writer, self.accepted.pop()

    async def still_serves(self) -> None:
        other = TcpTransport(CALM)
        try:
            end = await other.connect(f"tcp://{self.host}:{self.port}", soon(), Notes().hear)
            into = [memoryview(bytearray(70_000))]
            source = [memoryview(noise(1, 70_000))]
            await end.read(self.transport.export(source, soon()), into, soon())
            assert into[0] == source[0]
        finally:
            await other.close()


def visit(scenario: Callable[[Place], Awaitable[None]], limits: Limits = CALM) -> None:
    """Whatever the stranger does, nothing is raised on the loop, and the next peer is served."""

    async def main() -> None:
        raised: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
        async with place(limits) as found:
            await scenario(found)
            await found.still_serves()
        assert raised == []

    asyncio.run(main())


@contextlib.asynccontextmanager
async def place(limits: Limits) -> AsyncIterator[Place]:
    transport, notes, accepted = TcpTransport(limits), Notes(), list[Endpoint]()
    listener = await transport.listen(DEFAULT_ADDRESS, accepted.append, notes.hear)
    host, _, port = listener.address.removeprefix("tcp://").rpartition(":")
    try:
        yield Place(transport, notes, accepted, host, int(port))
    finally:
        await transport.close()
