"""``tcp://host:port``: always there, and what every other transport is compared with.

    listener ── accept ─► greeting (hello within the silence, at most ``_GREETINGS_MAX`` at once)
                             └── all streams of a session ─► endpoint
    connect  ── socket, hello, hello back; for each stream ─► endpoint

Who may connect is not asked here: without a ticket a stranger can only tell notes, and a ticket is 16
random bytes that the control channel gives to whom it knows. Bytes go in the clear.

An endpoint has one stream; more help where a connection is held back by its window or by one queue of a
network card, not by this process, whose loop serves them all.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from kvcache.address import TcpAddress, parse
from kvcache.clock import Clock, SystemClock
from kvcache.errors import BadInput
from kvcache.transport.base import Endpoint, Limits, Note, PeerLost, Ticket, TransferLate
from kvcache.transport.flow import Flow, until
from kvcache.transport.tcp_endpoint import Parts, TcpEndpoint
from kvcache.transport.tcp_frames import HELLO, STREAMS_MAX, Hello
from kvcache.transport.tickets import Book

SCHEME = "tcp"
DEFAULT_ADDRESS = "tcp://127.0.0.1:0"
_GREETINGS_MAX = 64
_BACKLOG = 128
_SESSION_BYTES = 16
_SAME_HOST_SEND_BYTES = 256 << 10
"""On one host what was sent lies in memory until it is read: so little of it stays in the caches, and goes
at twice the speed. Over a network the system's own sizing is needed, which grows with the distance."""
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NO_ROOM_S = 0.5


@dataclass(slots=True)
class _Session:
    """The streams of one endpoint, as they come."""

    socks: dict[int, socket.socket]
    complete: asyncio.Event = field(default_factory=asyncio.Event)


class TcpListener:
    """Use ``TcpTransport.listen``."""

    def __init__(
        self,
        sock: socket.socket,
        address: TcpAddress,
        clock: Clock,
        limits: Limits,
        joined: Callable[[Sequence[socket.socket]], None],
    ) -> None:
        self._sock = sock
        self._address = address
        self._clock = clock
        self._limits = limits
        self._joined = joined
        self._sessions: dict[bytes, _Session] = {}
        self._greetings: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._accept)

    @property
    def address(self) -> str:
        return str(self._address)

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._sock)
        self._sock.close()
        for greeting in self._greetings:
            greeting.cancel()
        await asyncio.gather(*self._greetings, return_exceptions=True)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:  # Who waits still waits, and the loop would call again at once.
                self._loop.remove_reader(self._sock)
                self._loop.call_later(_NO_ROOM_S, self._resume)
            return
        if len(self._greetings) >= _GREETINGS_MAX:
            sock.close()
            return
        _prepare(sock)
        greeting = self._loop.create_task(self._greet(sock))
        self._greetings.add(greeting)
        greeting.add_done_callback(self._greetings.discard)

    def _resume(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._sock, self._accept)

    async def _greet(self, sock: socket.socket) -> None:
        """Hear who it is, within the time of a silence; the last stream of a session makes the endpoint."""
        session = _Session({})
        try:
            async with until(self._clock.now_ns() + self._limits.silence_ns, self._clock):
                hello = Hello.parse(await _receive(sock, HELLO.size))
                session = self._sessions.setdefault(hello.session, session)
                if hello.stream in session.socks:
                    raise PeerLost("a stream that is there")
                session.socks[hello.stream] = sock
                await self._loop.sock_sendall(sock, hello.pack())
                if len(session.socks) == hello.stream_count:
                    session.complete.set()
                    del self._sessions[hello.session]
                    self._joined([session.socks[at] for at in sorted(session.socks)])
                await session.complete.wait()
        except (OSError, PeerLost, TransferLate, asyncio.CancelledError):
            if not session.complete.is_set():
                self._refuse(sock)

    def _refuse(self, sock: socket.socket) -> None:
        """Close it, and what else of its session has come, unless that has become an endpoint."""
        for name, session in list(self._sessions.items()):
            if sock in session.socks.values():
                del self._sessions[name]
                for other in session.socks.values():
                    other.close()
        sock.close()


class TcpTransport:
    """Blocks over TCP, for one event loop."""

    def __init__(
        self, limits: Limits | None = None, clock: Clock | None = None, stream_count: int = 1
    ) -> None:
        """``stream_count``: connections of an endpoint that this side opens."""
        assert 1 <= stream_count <= STREAMS_MAX, "an endpoint has a stream, and not too many"
        self._limits = limits or Limits()
        self._clock = clock or SystemClock()
        self._stream_count = stream_count
        self._flow = Flow(self._limits, self._clock)
        self._book = Book(self._clock)
        self._endpoints: set[TcpEndpoint] = set()
        self._listeners: list[TcpListener] = []

    @property
    def scheme(self) -> str:
        return SCHEME

    async def listen(self, address: str, accepted: Callable[[Endpoint], None], note: Note) -> TcpListener:
        where = _parse(address)
        sock = await asyncio.to_thread(_listening, where)

        def joined(socks: Sequence[socket.socket]) -> None:
            accepted(self._endpoint(socks, note))

        taken = TcpAddress(where.host, sock.getsockname()[1])
        listener = TcpListener(sock, taken, self._clock, self._limits, joined)
        self._listeners.append(listener)
        return listener

    async def connect(self, address: str, deadline_ns: int, note: Note) -> TcpEndpoint:
        where = _parse(address)
        session = secrets.token_bytes(_SESSION_BYTES)
        socks: list[socket.socket] = []
        try:
            async with until(deadline_ns, self._clock):
                for stream in range(self._stream_count):
                    sock = await _connected(where)
                    socks.append(sock)
                    await _say_hello(sock, Hello(session, stream, self._stream_count))
        except BaseException as error:  # Cancellation too: a socket must not be left.
            for sock in socks:
                sock.close()
            if isinstance(error, OSError):
                raise PeerLost(f"{address} does not answer: {error}") from error
            raise
        return self._endpoint(socks, note)

    def register(self, memory: memoryview) -> None:
        """There is nothing to prepare: the system copies from any memory."""

    def export(self, pieces: Sequence[memoryview], until_ns: int) -> Ticket:
        return self._book.export(pieces, until_ns)

    def post(self, pieces: Sequence[memoryview], until_ns: int, filled: Callable[[], None]) -> Ticket:
        return self._book.post(pieces, until_ns, filled)

    async def withdraw(self, ticket: Ticket) -> None:
        await self._book.withdraw(ticket)

    async def close(self) -> None:
        for listener in self._listeners:
            await listener.close()
        for endpoint in list(self._endpoints):
            await endpoint.close()
        await self._book.close()

    def _endpoint(self, socks: Sequence[socket.socket], note: Note) -> TcpEndpoint:
        parts = Parts(self._book, self._limits, self._clock, note, self._endpoints.discard)
        for sock in socks:
            _size(sock)
        endpoint = TcpEndpoint(parts, self._flow.gate(), _peer_name(socks[0]), socks)
        self._endpoints.add(endpoint)
        return endpoint


def _parse(address: str) -> TcpAddress:
    where = parse(address)
    if not isinstance(where, TcpAddress):
        raise BadInput("bad_config", f"{address!r} is no address of tcp", "", "write tcp://host:port")
    return where


def _listening(where: TcpAddress) -> socket.socket:
    """RAISES BadInput."""
    try:
        family, _, _, _, target = socket.getaddrinfo(
            where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.create_server((str(target[0]), where.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        code = "address_in_use" if error.errno == errno.EADDRINUSE else "bad_config"
        raise BadInput(code, f"cannot listen at {where}", str(error), "choose another address") from error
    sock.setblocking(False)
    return sock


async def _connected(where: TcpAddress) -> socket.socket:
    """RAISES OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
    failure = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    for family, _, _, _, target in found:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            _prepare(sock)
            await loop.sock_connect(sock, target)
            return sock
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise failure


async def _say_hello(sock: socket.socket, hello: Hello) -> None:
    """RAISES OSError, PeerLost."""
    await asyncio.get_running_loop().sock_sendall(sock, hello.pack())
    if Hello.parse(await _receive(sock, HELLO.size)) != hello:
        raise PeerLost("it answered for another session")


async def _receive(sock: socket.socket, byte_count: int) -> bytearray:
    """Just so many bytes. RAISES OSError, PeerLost."""
    data = bytearray(byte_count)
    view = memoryview(data)
    while view:
        count = await asyncio.get_running_loop().sock_recv_into(sock, view)
        if not count:
            raise PeerLost("it closed the connection before it said who it is")
        view = view[count:]
    return data


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    with suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _size(sock: socket.socket) -> None:
    with suppress(OSError):  # A peer that is gone already is seen when it is read from.
        if sock.getpeername()[0] == sock.getsockname()[0]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SAME_HOST_SEND_BYTES)


def _peer_name(sock: socket.socket) -> str:
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return "a peer that is gone"
    return str(TcpAddress(host, port))
