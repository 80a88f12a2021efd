"""The look-up service's sockets: raw frames (``kvcache.locate_wire``), a thread a connection.

    accepted ──greeted, may ask──► asking ──question whole──► answered ─┐
        │                            ▲──────────────────────────────────┘
        └── stranger, garbage, late, too many, slow ──► closed, and nothing else happens

Threads and blocking sockets, not a loop: a question costs one receive, one send and no scheduling between.
A client that is slow or silent holds its own thread and nobody else's; there are ``connections_max`` of them.

* A question is whole within ``CALL_S`` of its first byte, its answer taken within ``CALL_S``, a greeting too.
* Who says nothing for ``IDLE_S`` is closed; a ``Locator`` then connects anew, without a word.
* Who may ask: the roles router and operator, as anywhere: a token, or the user at a unix socket, or, without
  a credentials file, whoever comes from loopback.

The sum: 5 us of Python a question besides the index's 2, and two wake-ups: 15 to 25 us on a unix socket.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvcache import locate_wire as wire
from kvcache.address import Address, TcpAddress, UnixAddress
from kvcache.config import is_loopback
from kvcache.credentials import Credentials
from kvcache.errors import BadInput, KVCacheError, Unavailable
from kvcache.server.binding import refuse_unsafe_bind
from kvcache.server.identity import Identity, credential_for, peer_of
from kvcache.server.listening import listen_tcp, listen_unix, lock, tune

log = logging.getLogger("kvcache.server.locate")

CONNECTIONS_MAX = 64
CALL_S = 2.0
IDLE_S = 600.0
JOIN_S = 2.0
ROLES = frozenset({"router", "operator"})
TICK_S = 1.0
"""So often a thread that waits looks at the time."""
_BUFFER_BYTES = wire.FRAME.size + wire.ASKED_BYTES_MAX


class Answers(Protocol):
    """Who answers. Called from many threads at once. All of it RAISES KVCacheError, which is told."""

    def query(
        self, tenant: str, asked: wire.Asked, selector: bytes, hints: memoryview
    ) -> Sequence[bytes | memoryview]:
        """The parts of an ANSWER."""

    def place(self, tenant: str, source: str, namespace: bytes, hints: memoryview) -> None: ...

    def sources(self, tenant: str) -> bytes:
        """JSON."""

    def names(self, tenant: str) -> bytes:
        """JSON."""


class LocateFrames:
    """Listens where it is told. ``close`` ends all of it, and may be called twice."""

    def __init__(
        self,
        answers: Answers,
        credentials: Credentials,
        connections_max: int = CONNECTIONS_MAX,
        setting: str = "listen",
    ) -> None:
        """``setting`` is what the addresses are given with."""
        self.asked = 0
        """Questions answered so far."""
        self._answers = answers
        self._credentials = credentials
        self._connections_max = connections_max
        self._setting = setting
        self._guard = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._listeners: list[tuple[socket.socket, threading.Thread]] = []
        self._locks: list[int] = []
        self._paths: list[Path] = []
        self._closing = threading.Event()

    @property
    def connections(self) -> int:
        return len(self._open)

    @property
    def _option(self) -> str:
        return f"--{self._setting.replace('_', '-')}"

    def listen(self, address: Address) -> str:
        """From now on. Returns the address, with its port if the system chose it. RAISES BadInput."""
        if isinstance(address, UnixAddress):
            path = Path(address.path)
            self._locks.append(lock(path, self._option))
            # Who is at the other end of a unix socket the kernel says, so others may try.
            others = self._credentials.has_tokens or self._credentials.lists_other_users(os.getuid())
            listener = listen_unix(path, 0o666 if others else 0o600, self._option)
            self._paths.append(path)
            where = str(address)
        else:
            refuse_unsafe_bind((address.host, address.port), self._credentials, self._setting)
            listener = listen_tcp(address.host, address.port, self._option)
            where = str(TcpAddress(address.host, listener.getsockname()[1]))
        listener.setblocking(True)
        thread = threading.Thread(target=self._accept, args=(listener,), name="kvcache-accept", daemon=True)
        self._listeners.append((listener, thread))
        thread.start()
        return where

    def close(self) -> None:
        self._closing.set()
        for listener, thread in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join(JOIN_S)
            listener.close()
        with self._guard:
            still = dict(self._open)
        for connection in still:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in still.values():
            thread.join(JOIN_S)
        for path in self._paths:
            path.unlink(missing_ok=True)
        for descriptor in self._locks:
            os.close(descriptor)
        self._listeners, self._paths, self._locks = [], [], []

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                connection, peer = listener.accept()
            except ConnectionError:
                continue
            except OSError as error:
                if not self._closing.wait(TICK_S / 10):  # Out of descriptors, for instance.
                    log.warning("cannot take a connection: %s", error)
                continue
            host = peer[0] if listener.family != socket.AF_UNIX else ""
            self._begin(connection, host)

    def _begin(self, connection: socket.socket, host: str) -> None:
        thread = threading.Thread(
            target=self._serve, args=(connection, host), name="kvcache-locate", daemon=True
        )
        with self._guard:
            if len(self._open) < self._connections_max and not self._closing.is_set():
                self._open[connection] = thread
                with contextlib.suppress(RuntimeError):  # The system has no more threads.
                    thread.start()
                    return
                del self._open[connection]
        too_many = Unavailable(
            "unavailable", f"{len(self._open)} connections are open", "", "ask another replica"
        )
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            connection.send(wire.failure(too_many))
        connection.close()

    def _serve(self, connection: socket.socket, host: str) -> None:
        """One connection, to its end."""
        try:
            with contextlib.suppress(OSError, _Ended):
                tune(connection)
                _limit(connection)
                line = _Line(connection)
                tenant = self._greet(line, host)
                while True:
                    self._answer(line, tenant)
        finally:
            with self._guard:
                self._open.pop(connection, None)
            connection.close()

    def _greet(self, line: _Line, host: str) -> str:
        """The tenant whom the connection is for."""
        try:
            head = line.take(wire.GREETING.size, CALL_S)
            token = bytes(line.take(wire.greeted(head), CALL_S)).decode("ascii", "replace")
            peer = peer_of(line.connection)
            credential, _ = credential_for(
                self._credentials, token, peer, loopback=is_loopback(host), inside_token=""
            )
            Identity(0, credential.tenant, credential.roles, 0, False, peer).require(*sorted(ROLES))
        except KVCacheError as error:
            line.send([wire.failure(error)])
            raise _Ended from error
        line.send([wire.told(wire.WELCOME)])
        return credential.tenant

    def _answer(self, line: _Line, tenant: str) -> None:
        """One question and its answer."""
        view = line.frame()
        try:
            asked = wire.asked(view)
            body = line.rest(asked.first_bytes + asked.hint_bytes)
        except BadInput as error:  # Where the next question would begin is not known.
            line.send([wire.failure(error)])
            raise _Ended from error
        try:
            parts = self._told(asked, tenant, body)
        except KVCacheError as error:
            parts = [wire.failure(error)]
        with self._guard:
            self.asked += 1
        line.send(parts)

    def _told(self, asked: wire.Asked, tenant: str, body: memoryview) -> Sequence[bytes | memoryview]:
        first, hints = bytes(body[: asked.first_bytes]), body[asked.first_bytes :]
        if asked.kind == wire.QUERY:
            return self._answers.query(tenant, asked, first, hints)
        if asked.kind == wire.PLACE:
            source, namespace = wire.read_place(first)
            self._answers.place(tenant, source, namespace, hints)
            return [wire.told(wire.DONE)]
        say = self._answers.sources if asked.kind == wire.SOURCES else self._answers.names
        return [wire.told(wire.TEXT, say(tenant))]


class _Ended(Exception):
    """This connection is over."""


class _Line:
    """One connection's bytes. The system's own timeouts wake it every ``TICK_S``."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        # Pages of it that no question reaches are never taken.
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._got = 0
        self._began = 0.0

    def take(self, count: int, limit_s: float) -> memoryview:
        """The next ``count`` bytes."""
        self._began, self._got = time.monotonic(), 0
        self._fill(count, limit_s)
        return self._buffer[:count]

    def frame(self) -> memoryview:
        """At least the head of a question: one receive mostly brings all of it."""
        self._got, idle_until = 0, time.monotonic() + IDLE_S
        while True:
            try:
                self._got = self.connection.recv_into(self._buffer)
                break
            except BlockingIOError:
                if time.monotonic() > idle_until:
                    raise _Ended from None
        if not self._got:
            raise _Ended
        if self._got < wire.FRAME.size:
            self._began = time.monotonic()
            self._fill(wire.FRAME.size, CALL_S)
        else:
            self._began = 0.0
        return self._buffer

    def rest(self, body_bytes: int) -> memoryview:
        """The body of the question whose head ``frame`` gave. RAISES BadInput when more came than that."""
        whole = wire.FRAME.size + body_bytes
        if self._got < whole:
            self._began = self._began or time.monotonic()
            self._fill(whole, CALL_S)
        elif self._got > whole:
            raise BadInput("bad_frame", "a question before the answer to the one before was taken")
        return self._buffer[wire.FRAME.size : whole]

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        began, sent = time.monotonic(), 0
        with contextlib.suppress(BlockingIOError):
            sent = self.connection.sendmsg(parts)
        if sent == sum(map(len, parts)):
            return
        left = memoryview(b"".join(parts))[sent:]
        while left:
            if time.monotonic() - began > CALL_S:
                raise _Ended
            with contextlib.suppress(BlockingIOError):
                left = left[self.connection.send(left) :]

    def _fill(self, count: int, limit_s: float) -> None:
        """Until so much has come. What is late ends the connection, however it trickles."""
        while self._got < count:
            with contextlib.suppress(BlockingIOError):
                got = self.connection.recv_into(self._buffer[self._got : count])
                if not got:
                    raise _Ended
                self._got += got
            if self._got < count and time.monotonic() - self._began > limit_s:
                raise _Ended


def _limit(connection: socket.socket) -> None:
    """One system call a receive: Python's own timeouts would poll before each."""
    span = struct.pack("ll", int(TICK_S), int(TICK_S % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, span)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, span)
