"""``nixl://``: one-sided reads by NIXL (UCX underneath), InfiniBand verbs among what it can use.

A control socket of our own for each connection (``nixl_wire``), transfers over the agents (``nixl``).
docs/transports.md says what carries the bytes where, and what a peer is trusted with.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence

from kvcache.address import TcpAddress, parse
from kvcache.clock import NS_PER_S, Clock, SystemClock
from kvcache.errors import BadInput
from kvcache.transport.base import Endpoint, Limits, Note, PeerLost, Ticket, TransferLate
from kvcache.transport.flow import Flow, until
from kvcache.transport.nixl import Agents
from kvcache.transport.nixl_endpoint import NixlEndpoint
from kvcache.transport.nixl_wire import Control
from kvcache.transport.tickets import Book

SCHEME = "nixl"
ACCEPT_NS = 10 * NS_PER_S
"""A peer that connects has so long to make its path."""
ACCEPTING_MAX = 64


class NixlListener:
    """Use ``NixlTransport.listen``."""

    def __init__(self, server: asyncio.Server, host: str) -> None:
        self._server = server
        port = int(server.sockets[0].getsockname()[1])
        self._address = _address(host, port)

    @property
    def address(self) -> str:
        return self._address

    async def close(self) -> None:
        self._server.close()


class NixlTransport:
    """For one event loop."""

    def __init__(self, limits: Limits | None = None, clock: Clock | None = None) -> None:
        self.limits = limits or Limits()
        self.clock = clock or SystemClock()
        self.flow = Flow(self.limits, self.clock)
        self.book = Book(self.clock)
        self.agents = Agents()
        self._listeners: list[NixlListener] = []
        self._endpoints: set[NixlEndpoint] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def scheme(self) -> str:
        return SCHEME

    async def listen(self, address: str, accepted: Callable[[Endpoint], None], note: Note) -> NixlListener:
        where = _parse(address)
        assert not self._is_closed, "it is closed"
        await self.agents.start()

        def came(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._task(self._accept(Control(reader, writer), _peer_of(writer), accepted, note))

        try:
            server = await asyncio.start_server(came, where.host, where.port, reuse_address=True)
        except OSError as error:
            raise BadInput(
                "address_in_use", f"{address} cannot be listened at", str(error), "choose another port"
            ) from error
        listener = NixlListener(server, where.host)
        self._listeners.append(listener)
        return listener

    async def connect(self, address: str, deadline_ns: int, note: Note) -> NixlEndpoint:
        where = _parse(address)
        async with until(deadline_ns, self.clock):
            if self._is_closed:
                raise PeerLost("this side is closed")
            await self.agents.start()
            try:
                reader, writer = await asyncio.open_connection(where.host, where.port)
            except OSError as error:
                raise PeerLost(f"nobody answers at {address}: {error}") from error
            return await self._begin(Control(reader, writer), address, note)

    def register(self, memory: memoryview) -> None:
        """Blocks until it is pinned: for start-up."""
        description = self.agents.register(memory)
        for endpoint in list(self._endpoints):
            endpoint.remember(description)

    def export(self, pieces: Sequence[memoryview], until_ns: int) -> Ticket:
        return self.book.export(pieces, until_ns)

    def post(self, pieces: Sequence[memoryview], until_ns: int, filled: Callable[[], None]) -> Ticket:
        return self.book.post(pieces, until_ns, filled)

    async def withdraw(self, ticket: Ticket) -> None:
        await self.book.withdraw(ticket)

    async def close(self) -> None:
        self._is_closed = True
        for listener in self._listeners:
            await listener.close()
        await asyncio.gather(*(endpoint.close() for endpoint in list(self._endpoints)))
        await self.book.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.agents.close()

    async def take_back(self, ticket: Ticket, within_s: float) -> None:
        """Withdraw it. When that takes longer, it goes on behind: the peer is asked, and answers or is lost;
        what he reads meanwhile is good for nothing, because he is not told that it was good."""
        await asyncio.wait([self._task(self.book.withdraw(ticket))], timeout=within_s)

    def left(self, endpoint: NixlEndpoint) -> None:
        """Nothing of it runs any more."""
        self._endpoints.discard(endpoint)

    async def _accept(
        self, control: Control, peer: str, accepted: Callable[[Endpoint], None], note: Note
    ) -> None:
        if self._is_closed or len(self._tasks) > ACCEPTING_MAX:
            control.close()
            await control.closed(0)
            return
        try:
            async with until(self.clock.now_ns() + ACCEPT_NS, self.clock):
                endpoint = await self._begin(control, peer, note)
        except (PeerLost, TransferLate):
            return  # Nobody here waits for it.
        accepted(endpoint)

    async def _begin(self, control: Control, peer: str, note: Note) -> NixlEndpoint:
        """RAISES PeerLost."""
        endpoint = NixlEndpoint(self, control, peer, note)
        self._endpoints.add(endpoint)
        try:
            await endpoint.start()
        except BaseException as error:
            endpoint.lose(str(error) or "it was not waited for")
            raise
        return endpoint

    def _task(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _address(host: str, port: int) -> str:
    return f"{SCHEME}://[{host}]:{port}" if ":" in host else f"{SCHEME}://{host}:{port}"


def _parse(address: str) -> TcpAddress:
    """RAISES BadInput."""
    scheme, found, rest = address.partition("://")
    if found and scheme == SCHEME:
        where = parse(f"tcp://{rest}")
        assert isinstance(where, TcpAddress)
        return where
    raise BadInput("bad_config", f"{address!r} is no address", "", f"write {SCHEME}://host:port")


def _peer_of(writer: asyncio.StreamWriter) -> str:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    host, port = writer.get_extra_info("peername")[:2]
    return _address(host, port)
