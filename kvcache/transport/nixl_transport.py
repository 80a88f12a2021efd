"""``nixl://``: one-sided reads by NIXL (UCX underneath), InfiniBand verbs among what it can use.

A control socket of our own for each connection (``nixl_wire``), transfers over the agents (``nixl``). Who
does not prove on it that he knows the listener's key is told nothing, and nothing of his is done.
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
from kvcache.transport.doorstep import WAITING_MAX, Doorstep, Guest
from kvcache.transport.flow import Flow, until
from kvcache.transport.keys import is_key, split_key, with_key
from kvcache.transport.nixl import Agents
from kvcache.transport.nixl_endpoint import NixlEndpoint
from kvcache.transport.nixl_wire import Control
from kvcache.transport.tickets import Book

SCHEME = "nixl"
ACCEPT_NS = 10 * NS_PER_S
"""A peer that was let in has so long to make its path."""
GREET_NS = 2 * NS_PER_S
"""Whoever connects has so long to prove that he may."""
ACCEPTING_MAX = 64
ENDPOINTS_MAX = 256


class NixlListener:
    """Use ``NixlTransport.listen``."""

    def __init__(self, server: asyncio.Server, host: str, key: bytes, doorstep: Doorstep) -> None:
        self._server = server
        self._key = key
        self._doorstep = doorstep
        port = int(server.sockets[0].getsockname()[1])
        self._address = _address(host, port)

    @property
    def address(self) -> str:
        """With the key: for authenticated peers, not for logs."""
        return with_key(self._address, self._key)

    @property
    def refused_count(self) -> int:
        """Connections that were not let in."""
        return self._doorstep.refused_count

    async def close(self) -> None:
        self._server.close()


class NixlTransport:
    """For one event loop."""

    def __init__(self, limits: Limits | None = None, clock: Clock | None = None, key: bytes = b"") -> None:
        """``key``: what those who connect must know; they have it from the listener's address. Empty: anybody
        may."""
        assert is_key(key), "a key is long enough that nobody guesses it"
        self._key = key
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

        doorstep = Doorstep(address, self.clock)

        def came(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            control = Control(reader, writer)
            where = _peer_of(writer)
            if where is None:
                control.cut()
                return
            guest = doorstep.enter(where.host, control.cut)
            self._task(self._accept(control, guest, where, accepted, note))

        try:
            server = await asyncio.start_server(came, where.host, where.port, reuse_address=True)
        except OSError as error:
            raise BadInput(
                "address_in_use", f"{address} cannot be listened at", str(error), "choose another port"
            ) from error
        doorstep.name = _address(where.host, server.sockets[0].getsockname()[1])
        listener = NixlListener(server, where.host, self._key, doorstep)
        self._listeners.append(listener)
        return listener

    async def connect(self, address: str, deadline_ns: int, note: Note) -> NixlEndpoint:
        address, key = split_key(address)
        where = _parse(address)
        async with until(deadline_ns, self.clock):
            if self._is_closed:
                raise PeerLost("this side is closed")
            await self.agents.start()
            try:
                reader, writer = await asyncio.open_connection(where.host, where.port)
            except OSError as error:
                raise PeerLost(f"nobody answers at {address}: {error}") from error
            control = Control(reader, writer)
            try:
                await control.introduce(key)
            except BaseException:
                control.cut()
                raise
            return await self._begin(control, address, note)

    def register(self, memory: memoryview) -> None:
        if not self._is_closed:
            self.agents.register(memory, self._tell)

    def forget(self, memory: memoryview) -> None:
        if not self._is_closed:
            self.agents.unregister(memory)

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

    def _tell(self, description: bytes) -> None:
        """More memory is registered."""
        for endpoint in list(self._endpoints):
            endpoint.remember(description)

    async def _accept(
        self,
        control: Control,
        guest: Guest,
        where: TcpAddress,
        accepted: Callable[[Endpoint], None],
        note: Note,
    ) -> None:
        if not await self._let_in(control, guest):
            await control.closed(0)
            return
        peer = _address(where.host, where.port)
        try:
            async with until(self.clock.now_ns() + ACCEPT_NS, self.clock):
                endpoint = await self._begin(control, peer, note)
        except (PeerLost, TransferLate):
            return  # Nobody here waits for it.
        accepted(endpoint)

    async def _let_in(self, control: Control, guest: Guest) -> bool:
        """Has he proved that he may, and is there room for him? He is cut off where not."""
        is_in = False
        try:
            async with until(self.clock.now_ns() + GREET_NS, self.clock):
                await control.let_in(self._key)
            if len(self._tasks) > ACCEPTING_MAX + WAITING_MAX or len(self._endpoints) >= ENDPOINTS_MAX:
                raise PeerLost("there are too many connections already")
            is_in = not self._is_closed
        except (PeerLost, TransferLate) as error:
            guest.refuse(str(error))
        finally:
            guest.leave()
            if not is_in:
                control.cut()
        return is_in

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


def _peer_of(writer: asyncio.StreamWriter) -> TcpAddress | None:
    """None when it is gone already."""
    name = writer.get_extra_info("peername")
    if not name:
        return None
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return TcpAddress(name[0], name[1])
