"""``tcp://host:port``: always there, and what every other transport is compared with.

    listen   ── ``tcp_listener``: who comes and knows the key ─► endpoint
    connect  ── for each stream a socket and the greeting, of the key in the address ─► endpoint

Both sides prove that they know the listener's key, which is in its address (``keys``): the control channel
tells it to whom it has authenticated. Without a key anybody may come, and do what a ticket allows: a ticket
is 16 random bytes that the control channel gives to whom it knows. Bytes go in the clear: see SECURITY.md.

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

from kvcache.address import TcpAddress, parse
from kvcache.clock import Clock, SystemClock
from kvcache.errors import BadInput
from kvcache.transport.base import Endpoint, Limits, Note, PeerLost, Ticket
from kvcache.transport.flow import Flow, until
from kvcache.transport.keys import (
    CONNECTS,
    LISTENS,
    PROOF_BYTES,
    is_key,
    is_proof,
    new_nonce,
    proof,
    split_key,
)
from kvcache.transport.tcp_endpoint import Parts, TcpEndpoint
from kvcache.transport.tcp_frames import CHALLENGE, STREAMS_MAX, Hello, check_challenge
from kvcache.transport.tcp_listener import TcpListener, prepare, receive
from kvcache.transport.tickets import Book

SCHEME = "tcp"
DEFAULT_ADDRESS = "tcp://127.0.0.1:0"
_BACKLOG = 128
_SESSION_BYTES = 16
_SAME_HOST_SEND_BYTES = 256 << 10
"""On one host what was sent lies in memory until it is read: so little of it stays in the caches, and goes
at twice the speed. Over a network the system's own sizing is needed, which grows with the distance."""


class TcpTransport:
    """Blocks over TCP, for one event loop."""

    def __init__(
        self,
        limits: Limits | None = None,
        clock: Clock | None = None,
        stream_count: int = 1,
        key: bytes = b"",
    ) -> None:
        """``stream_count``: connections of an endpoint that this side opens. ``key``: what those who connect
        must know; they have it from the listener's address. Empty: anybody may."""
        assert 1 <= stream_count <= STREAMS_MAX, "an endpoint has a stream, and not too many"
        assert is_key(key), "a key is long enough that nobody guesses it"
        self._limits = limits or Limits()
        self._clock = clock or SystemClock()
        self._stream_count = stream_count
        self._key = key
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

        def joined(socks: Sequence[socket.socket], left: Callable[[], None]) -> None:
            accepted(self._endpoint(socks, note, left))

        taken = TcpAddress(where.host, sock.getsockname()[1])
        listener = TcpListener(sock, taken, self._key, self._clock, self._limits, joined)
        self._listeners.append(listener)
        return listener

    async def connect(self, address: str, deadline_ns: int, note: Note) -> TcpEndpoint:
        address, key = split_key(address)
        where = _parse(address)
        session = secrets.token_bytes(_SESSION_BYTES)
        socks: list[socket.socket] = []
        try:
            async with until(deadline_ns, self._clock):
                for stream in range(self._stream_count):
                    sock = await _connected(where)
                    socks.append(sock)
                    await _greet(sock, Hello(session, stream, self._stream_count, new_nonce()), key)
        except BaseException as error:  # Cancellation too: a socket must not be left.
            for sock in socks:
                sock.close()
            if isinstance(error, OSError):
                raise PeerLost(f"{address} does not answer: {error}") from error
            raise
        return self._endpoint(socks, note, lambda: None)

    def register(self, memory: memoryview) -> None:
        """There is nothing to prepare: the system copies from any memory."""

    def forget(self, memory: memoryview) -> None:
        """There is nothing to undo."""

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

    def _endpoint(self, socks: Sequence[socket.socket], note: Note, left: Callable[[], None]) -> TcpEndpoint:
        def ended(endpoint: TcpEndpoint) -> None:
            self._endpoints.discard(endpoint)
            left()

        parts = Parts(self._book, self._limits, self._clock, note, ended)
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
        # As the control connection: [::] is every interface, by IPv4 too.
        everywhere = family == socket.AF_INET6 and str(target[0]) == "::" and socket.has_dualstack_ipv6()
        sock = socket.create_server(
            (str(target[0]), where.port), family=family, backlog=_BACKLOG, dualstack_ipv6=everywhere
        )
    except OSError as error:
        code = "address_in_use" if error.errno == errno.EADDRINUSE else "bad_config"
        raise BadInput(code, f"cannot listen at {where}", str(error), "choose another address") from error
    sock.setblocking(False)
    return sock


async def _connected(where: TcpAddress) -> socket.socket:
    """RAISES OSError."""
    loop = asyncio.get_running_loop()
    try:  # What is a number is not looked up, and waits for nobody's look-up.
        found = socket.getaddrinfo(
            where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    except socket.gaierror:
        found = await loop.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
    failure = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    for family, _, _, _, target in found:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            prepare(sock)
            await loop.sock_connect(sock, target)
            return sock
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise failure


async def _greet(sock: socket.socket, hello: Hello, key: bytes) -> None:
    """Prove that we know the key, and hear that he does. RAISES OSError, PeerLost."""
    loop = asyncio.get_running_loop()
    opening = hello.pack()
    await loop.sock_sendall(sock, opening)
    challenge = await receive(sock, CHALLENGE.size)
    check_challenge(challenge)
    said = opening + challenge
    await loop.sock_sendall(sock, proof(key, CONNECTS, said))
    try:
        answer = await receive(sock, PROOF_BYTES)
    except OSError as error:
        raise PeerLost(f"it did not let this side in (another key, or no room): {error}") from error
    if not is_proof(answer, key, LISTENS, said):
        raise PeerLost("it does not know the key of the address it was looked for at")


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
