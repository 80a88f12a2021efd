"""Who listens at ``tcp://``: lets in who knows the key, a bounded number of them, and joins their streams.

    accept ─► at the doorstep: hello, challenge, proof, within a silence       wrong: closed, without a word
                └─► seated: streams of one session, until all have come ─► endpoint ─► its end: seats are free

A stranger holds one of 64 descriptors (``doorstep``) for a silence at most. Who is seated knows the key, or
nobody was to ask for one; seats are bounded too.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvcache.address import TcpAddress
from kvcache.clock import Clock
from kvcache.transport.base import Limits, PeerLost, TransferLate
from kvcache.transport.doorstep import Doorstep, Guest
from kvcache.transport.flow import until
from kvcache.transport.keys import (
    CONNECTS,
    LISTENS,
    PROOF_BYTES,
    is_proof,
    new_nonce,
    proof,
    with_key,
)
from kvcache.transport.tcp_frames import HELLO, Hello, pack_challenge

SEATS_MAX = 512
"""Connections of all endpoints of a listener."""
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NO_ROOM_S = 0.5

Joined = Callable[[Sequence[socket.socket], Callable[[], None]], None]
"""All streams of an endpoint have come; what it calls when it has ended."""


@dataclass(slots=True)
class _Session:
    """The streams of one endpoint, as they come. ``over``: it is one, or will be none."""

    stream_count: int
    socks: dict[int, socket.socket] = field(default_factory=dict)
    greeted_count: int = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)


class TcpListener:
    """Use ``TcpTransport.listen``."""

    def __init__(
        self,
        sock: socket.socket,
        address: TcpAddress,
        key: bytes,
        clock: Clock,
        limits: Limits,
        joined: Joined,
    ) -> None:
        self._sock = sock
        self._address = address
        self._key = key
        self._clock = clock
        self._limits = limits
        self._joined = joined
        self._doorstep = Doorstep(str(address), clock)
        self._sessions: dict[bytes, _Session] = {}
        self._seated: set[socket.socket] = set()
        self._greetings: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._accept)

    @property
    def address(self) -> str:
        """With the key: for authenticated peers, not for logs."""
        return with_key(str(self._address), self._key)

    @property
    def refused_count(self) -> int:
        """Connections that were not let in."""
        return self._doorstep.refused_count

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
            sock, where = self._sock.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:  # Who waits still waits, and the loop would call again at once.
                self._loop.remove_reader(self._sock)
                self._loop.call_later(_NO_ROOM_S, self._resume)
            return
        prepare(sock)

        def send_away() -> None:
            greeting.cancel()

        guest = self._doorstep.enter(where[0], send_away)
        greeting = self._loop.create_task(self._greet(sock, guest))
        self._greetings.add(greeting)
        greeting.add_done_callback(partial(self._greeted, sock, guest))

    def _resume(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._sock, self._accept)

    async def _greet(self, sock: socket.socket, guest: Guest) -> None:
        """Let him in, within the time of a silence; the last stream of a session makes the endpoint."""
        try:
            async with until(self._clock.now_ns() + self._limits.silence_ns, self._clock):
                hello, answer = await self._ask(sock)
                session = self._seat(hello, sock)
                guest.leave()
                await self._loop.sock_sendall(sock, answer)
                session.greeted_count += 1
                if session.greeted_count == session.stream_count:
                    self._join(hello.session, session)
                await session.over.wait()
        except (PeerLost, TransferLate) as error:
            guest.refuse(str(error))
        except OSError:
            return  # He has gone by himself.

    async def _ask(self, sock: socket.socket) -> tuple[Hello, bytes]:
        """What he wants, and our proof, when his is right. RAISES OSError, PeerLost."""
        opening = await receive(sock, HELLO.size)
        hello = Hello.parse(opening)
        challenge = pack_challenge(new_nonce())
        await self._loop.sock_sendall(sock, challenge)
        said = opening + challenge
        if not is_proof(await receive(sock, PROOF_BYTES), self._key, CONNECTS, said):
            raise PeerLost("it does not know the key")
        return hello, proof(self._key, LISTENS, said)

    def _seat(self, hello: Hello, sock: socket.socket) -> _Session:
        """RAISES PeerLost."""
        if len(self._seated) >= SEATS_MAX:
            raise PeerLost(f"there are {SEATS_MAX} connections already")
        session = self._sessions.setdefault(hello.session, _Session(hello.stream_count))
        if hello.stream in session.socks or hello.stream_count != session.stream_count:
            raise PeerLost("a stream that is there, or of another session")
        session.socks[hello.stream] = sock
        self._seated.add(sock)
        return session

    def _join(self, name: bytes, session: _Session) -> None:
        socks = [session.socks[at] for at in sorted(session.socks)]
        del self._sessions[name]
        session.over.set()
        self._joined(socks, partial(self._seated.difference_update, socks))

    def _greeted(self, sock: socket.socket, guest: Guest, greeting: asyncio.Task[None]) -> None:
        """However it ended, before it began among others: close what has not become an endpoint."""
        self._greetings.discard(greeting)
        guest.leave()
        if sock not in self._seated:
            sock.close()
        for name, session in list(self._sessions.items()):
            if sock in session.socks.values():
                del self._sessions[name]
                session.over.set()
                self._seated.difference_update(session.socks.values())
                for other in session.socks.values():
                    other.close()


def prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        return  # It is gone already, which is seen when it is read from.


async def receive(sock: socket.socket, byte_count: int) -> bytes:
    """Just so many bytes. RAISES OSError."""
    data = bytearray(byte_count)
    view = memoryview(data)
    while view:
        count = await asyncio.get_running_loop().sock_recv_into(sock, view)
        if not count:
            raise ConnectionAbortedError(errno.ECONNABORTED, "it closed the connection")
        view = view[count:]
    return bytes(data)
